"""Running an evaluation in several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["Processes", "launched_processes"]


class Processes:
    """This process among its siblings; alone without a process group."""

    @property
    def active(self) -> bool:
        """Whether there is more than one process."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return dist.get_rank() if self.active else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if self.active else 1

    def agree(self, value: bool) -> bool:
        """The first process's value, for all: file systems may show different things."""
        if not self.active:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def launched_processes(device: torch.device) -> Iterator[Processes]:
    """Joins the group that ``torchrun`` announces in the environment, if any, and leaves it again.

    The first process solves regressions alone while the others wait, hence the long timeout.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1")) > 1
    own = announced and not dist.is_initialized()
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield Processes()
    finally:
        if own:
            dist.destroy_process_group()
