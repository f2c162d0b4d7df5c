"""Training that is really killed, anywhere, and started again ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time

import pytest

METHODS = ["dino_vmf", "ibot_vmf", "msn"]
DALI = ("data.format=dali", "dali.device=cpu")


def _formats() -> list[tuple[str, ...]]:
    return [("data.num_workers=2",), DALI]


@pytest.fixture
def survive(start, recipe, tmp_path):
    """Kill a run ``kills`` times at random moments, let the last start finish; returns the kills that hit."""

    def run(method: str, more: tuple[str, ...], kills: int, seed: int) -> int:
        rng, hits = random.Random(seed), 0
        for _ in range(kills):
            process = start(*recipe(method, *more))
            process.wait_until(lambda: list((tmp_path / "runs").rglob("*.ckpt")))
            time.sleep(rng.uniform(0, 0.8))
            process.kill()
            ended = process.end()
            assert ended.status in (0, -signal.SIGKILL), ended.err
            hits += ended.status != 0
        last = start(*recipe(method, *more)).end()
        assert last.status == 0, last.err
        return hits

    return run


def _check(method, more, kills, seed, survive, undisturbed, only_file, assert_same_run):
    assert survive(method, more, kills, seed) > 0
    assert only_file()["global_step"] == 18
    assert_same_run(undisturbed(method, *more), only_file())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("dino_vmf", _formats()[0], id="folder", marks=pytest.mark.slow),
        pytest.param("ibot_vmf", DALI, id="dali"),
    ],
)
def test_killed_twice__bit_for_bit_the_same_end(
    method, more, survive, undisturbed, only_file, assert_same_run
):
    _check(method, more, 2, 1, survive, undisturbed, only_file, assert_same_run)


@pytest.mark.slow
@pytest.mark.parametrize("more", _formats(), ids=["folder", "dali"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_six_times__bit_for_bit_the_same_end(
    method, more, seed, survive, undisturbed, only_file, assert_same_run
):
    _check(method, more, 6, seed, survive, undisturbed, only_file, assert_same_run)


HANG = {
    "half written": """
import torch, time
save = torch.save
def slow(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if content["epoch"] == 2:
        file.truncate(file.tell() // 2)
        open(MARKER, "w").close()
        time.sleep(600)
torch.save = slow
""",
    "before the rename": """
import os, time
replace = os.replace
def slow(source, target, **kwargs):
    if str(target).endswith("demo-ep2.ckpt"):
        open(MARKER, "w").close()
        time.sleep(600)
    replace(source, target, **kwargs)
os.replace = slow
""",
    "between rename and tidying": """
import time
from dinovmf_plugin.training.checkpointer import Checkpointer
tidy, calls = Checkpointer._tidy, []
def slow(self, newest):
    calls.append(newest)
    if len(calls) == 3:
        open(MARKER, "w").close()
        time.sleep(600)
    tidy(self, newest)
Checkpointer._tidy = slow
""",
}


@pytest.mark.parametrize("moment", HANG)
def test_killed_while_a_checkpoint_is_written(
    moment, start, recipe, undisturbed, only_file, checkpoints, assert_same_run, tmp_path
):
    """The third checkpoint hangs at that moment; the two before it are what the restart finds."""
    marker = tmp_path / "hangs"
    run = start(*recipe(), prelude=f"MARKER = {str(marker)!r}\n{HANG[moment]}")
    run.wait_until(marker.exists)
    run.kill()
    assert run.end().status == -signal.SIGKILL
    after = 3 if moment == "between rename and tidying" else 2
    assert checkpoints() == [f"demo-ep{i}.ckpt" for i in range(1, after)] + [
        "previous/demo-ep0.ckpt"
    ]
    resumed = start(*recipe()).end()
    assert resumed.status == 0, resumed.err
    assert f"demo-ep{after - 1}.ckpt" in resumed.out
    assert checkpoints() == ["demo-ep5.ckpt", "previous/demo-ep4.ckpt"]
    assert checkpoints(pattern="*.part") == []
    assert_same_run(undisturbed(), only_file())
