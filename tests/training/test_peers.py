"""A rank that stops ends the others, however it stopped; one that is done does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dinovmf_plugin.training.peers import PeerWatch

RANKS = 3


def _broadcast(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _rank(rank: int, file: str, stops: int, how: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    trainer: Any = SimpleNamespace(
        world_size=RANKS, global_rank=rank, strategy=SimpleNamespace(broadcast=_broadcast)
    )
    watch = PeerWatch(grace=1.0)
    watch.setup(trainer, None, "fit")
    dist.barrier()
    if rank == stops:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exits":
            os._exit(3)
        elif how == "raises":
            watch.on_exception(trainer, None, ValueError())
        else:
            watch.teardown(trainer, None, "fit")
        os._exit(0)
    time.sleep(4 if how == "done" else 60)  # as in a collective: it would wait for ever
    watch.teardown(trainer, None, "fit")
    os._exit(0)


@pytest.mark.parametrize("stops", [0, 1])
@pytest.mark.parametrize("how", ["killed", "exits", "raises", "done"])
def test_a_rank_that_stops__ends_the_others_within_a_minute(tmp_path: Path, stops: int, how: str):
    context = multiprocessing.get_context("fork")
    file = str(tmp_path / "rendezvous")
    ranks = [context.Process(target=_rank, args=(r, file, stops, how)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 45
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    others = [code for rank, code in enumerate(codes) if rank != stops]
    assert others == [0 if how == "done" else 1] * (RANKS - 1), codes


def test_one_process__no_connection():
    watch = PeerWatch()
    watch.setup(SimpleNamespace(world_size=1), None, "fit")  # type: ignore[arg-type]
    watch.teardown(None, None, "fit")  # type: ignore[arg-type]
    assert not watch._connections
