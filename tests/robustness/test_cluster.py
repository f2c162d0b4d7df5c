"""Several processes as torch, SLURM and submitit start them: the command lines of docs/training.md."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "main_pretrain.py")
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="hydra-submitit-launcher is not installed",
)


@pytest.fixture
def launch(tmp_path) -> Any:
    """Factory of processes ``python ARGUMENTS`` in ``tmp_path``; whatever is left is killed in the end."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **env: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = open(tmp_path / f"process{len(running)}.log", "w")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def logs(tmp_path) -> Callable[[], str]:
    """All that the processes printed."""

    def read() -> str:
        files = [*tmp_path.glob("process*.log"), *tmp_path.rglob(".submitit/*/*_log.*")]
        return "\n".join(f"{path}:\n{path.read_text()}" for path in files)

    return read


def _wait(condition: Callable[[], Any], logs: Callable[[], str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.02)


@pytest.mark.slow
@needs_submitit
def test_submitit_local__a_sweep(launch, recipe, logs, tmp_path):
    """Every job of a sweep is a process of its own, with a folder of its own."""
    sweep = ("-m", "hydra/launcher=submitit_local", "seed=0,1")
    config, *arguments = recipe(
        "dino_vmf", "max_epochs=1", "scheduler.warmup_epochs=0", "data.num_workers=0"
    )
    process = launch(SCRIPT, config, *sweep, *arguments)
    assert process.wait(timeout=240) == 0, logs()
    files = list((tmp_path / "runs").glob("dino_vmf/*/demo-ep0.ckpt"))
    seeds = {torch.load(p, weights_only=True)["dinovmf_plugin"]["cfg"]["seed"] for p in files}
    assert seeds == {0, 1}
    assert len(files) == 2


@needs_submitit
@pytest.mark.slow
def test_submitit__preempted__requeued_and_continued_exactly(
    launch, recipe, undisturbed, logs, checkpoints, only_file, assert_same_run
):
    """submitit's signal (USR2) waits for the end of the step; the requeued job goes on from there."""
    config, *arguments = recipe("dino_vmf", "max_epochs=40", "data.num_workers=0")
    process = launch(SCRIPT, config, "-m", "hydra/launcher=submitit_local", *arguments)
    _wait(lambda: "demo-ep2.ckpt" in checkpoints(), logs)
    found = subprocess.run(["ps", "-o", "pid,args", "-s", str(process.pid)], capture_output=True)
    jobs = [x.split()[0] for x in found.stdout.decode().splitlines() if "core._submit" in x]
    for job in jobs:
        os.kill(int(job), signal.SIGUSR2)
    assert process.wait(timeout=240) == 0, logs()
    assert "stopped by SIGUSR2 after step" in logs()
    assert "resuming from" in logs()
    assert_same_run(undisturbed("dino_vmf", "max_epochs=40"), only_file())


TWO = ("strategy=ddp", "optimizer.batch_size=2", "data.num_workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("entry", [(SCRIPT,), ("-m", "dinovmf_plugin", "main_pretrain")])
def test_two_processes__sigterm__all_stop_together_and_continue_exactly(
    entry, launch, recipe, logs, checkpoints, only_file, assert_same_run
):
    """Lightning starts the second process; the first alone is signalled, as ``kill PID`` does."""
    arguments = recipe("dino_vmf", "devices=2", *TWO, "max_epochs=14")
    process = launch(*entry, *arguments)
    _wait(lambda: "demo-ep2.ckpt" in checkpoints(), logs)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM, logs()
    assert "stopped by SIGTERM after step" in logs()
    assert "Traceback" not in logs()
    assert launch(*entry, *arguments).wait(timeout=240) == 0, logs()
    assert "resuming from" in logs()
    whole = launch(*entry, *recipe("dino_vmf", "devices=2", *TWO, "max_epochs=14", folder="whole"))
    assert whole.wait(timeout=240) == 0, logs()
    assert_same_run(only_file("whole"), only_file())


@pytest.mark.slow
def test_two_nodes_of_slurm__equal_two_devices_of_one(
    launch, recipe, logs, only_file, assert_same_run
):
    """srun starts one task per device and tells each its place; here the test does, on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost"}
    job |= {"SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    short = (*TWO, "max_epochs=2", "scheduler.warmup_epochs=1")
    arguments = recipe("ibot_vmf", *short, "devices=1", "num_nodes=2")
    tasks = [
        launch(SCRIPT, *arguments, **job, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank))
        for rank in range(2)
    ]
    assert [task.wait(timeout=240) for task in tasks] == [0, 0], logs()
    one = launch(SCRIPT, *recipe("ibot_vmf", *short, "devices=2", folder="one"))
    assert one.wait(timeout=240) == 0, logs()
    assert_same_run(only_file("one"), only_file())
