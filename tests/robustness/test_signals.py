"""SIGTERM, Ctrl-C and SLURM's requeue signal: the step is finished, saved, and later continued exactly."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

SLOW_STEPS = """
import time
from dinovmf_plugin.methods.base import SelfDistillation
step = SelfDistillation.training_step
def slow(self, batch, index):
    time.sleep(0.05)
    return step(self, batch, index)
SelfDistillation.training_step = slow
"""


@pytest.fixture
def stopped(start, recipe, checkpoints, tmp_path):
    """Signal a run in its third epoch or later; returns how it ended."""

    def run(number, *more, group=False, **kwargs):
        process = start(*recipe("dino_vmf", *more), prelude=SLOW_STEPS, **kwargs)
        process.wait_until(lambda: "demo-ep1.ckpt" in checkpoints())
        process.signal(number, group)
        return process.end()

    return run


def _check_continues(start, recipe, undisturbed, only_file, assert_same_run, ended, *more):
    (name,) = re.findall(r"(demo-ep\d+-step\d+\.ckpt|demo-ep\d+\.ckpt) is written", ended.out)
    resumed = start(*recipe("dino_vmf", *more)).end()
    assert resumed.status == 0, resumed.err
    assert re.search(rf"resuming from .*{name}", resumed.out)
    assert_same_run(undisturbed("dino_vmf", *more), only_file())


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_signal_to_all_processes__saved_at_once_and_continued(
    name, stopped, start, recipe, undisturbed, only_file, checkpoints, assert_same_run
):
    """As SLURM and a terminal do: the loader's worker processes get the signal too."""
    number = getattr(signal, name)
    workers = "data.num_workers=2"
    ended = stopped(number, workers, group=True)
    assert ended.status == 128 + number, ended.err
    assert "Traceback" not in ended.out + ended.err
    assert f"stopped by {name} after step" in ended.out
    assert len([x for x in checkpoints() if "/" not in x]) == 1
    _check_continues(start, recipe, undisturbed, only_file, assert_same_run, ended, workers)


def test_sigterm__gradient_accumulation__ends_with_an_optimizer_step(
    stopped, start, recipe, undisturbed, only_file, assert_same_run
):
    more = ("accumulate_grad_batches=2", "max_epochs=8", "data.num_workers=0")
    ended = stopped(signal.SIGTERM, *more)
    assert ended.status == 128 + signal.SIGTERM
    _check_continues(start, recipe, undisturbed, only_file, assert_same_run, ended, *more)


def test_ctrl_c_twice__stops_at_once_with_what_is_on_disk(start, recipe, checkpoints):
    never = SLOW_STEPS.replace("time.sleep(0.05)", "time.sleep(3600 * (self.current_epoch == 2))")
    process = start(*recipe("dino_vmf", "data.num_workers=0"), prelude=never)
    process.wait_until(lambda: {"demo-ep1.ckpt", "previous/demo-ep0.ckpt"} <= {*checkpoints()})
    process.signal(signal.SIGINT)
    process.wait_until(lambda: "Ctrl-C again stops at once" in process.out())
    process.signal(signal.SIGINT)
    ended = process.end()
    assert ended.status == 1  # Lightning's
    assert "Traceback" not in ended.out + ended.err
    assert checkpoints() == ["demo-ep1.ckpt", "previous/demo-ep0.ckpt"]


def test_slurm_requeue_signal__checkpoint_first_then_requeued(
    stopped, start, recipe, undisturbed, only_file, checkpoints, assert_same_run, tmp_path
):
    """Lightning requeues the job on SIGUSR1 (sbatch --signal=SIGUSR1@120), with this checkpoint on disk."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    log = tmp_path / "scontrol.log"
    scontrol.write_text(f'#!/bin/sh\nls {tmp_path}/runs/*/*/ > {log}; echo "$@" >> {log}\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    path = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    ended = stopped(signal.SIGUSR1, env=job | place | path)
    assert ended.status == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in ended.out
    (name,) = re.findall(r"(\S+\.ckpt) is written", ended.out)
    text = log.read_text()
    assert "requeue 17" in text
    assert Path(name).name in text
    _check_continues(start, recipe, undisturbed, only_file, assert_same_run, ended)
