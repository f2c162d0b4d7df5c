"""Exact reductions over the rows that all ranks hold, and the processes that ``torchrun`` starts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Processes",
    "any_rank",
    "is_distributed",
    "launched_processes",
    "log_total",
    "logsumexp_over_ranks",
    "mean_over_rows",
    "total",
    "world_size",
]


def is_distributed() -> bool:
    """Whether a process group of more than one rank is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if is_distributed() else 1


def any_rank(value: bool) -> bool | Tensor:
    """Whether a condition holds on any rank; with several a bool scalar on the device, not waited for."""
    if not is_distributed():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    holds = torch.full((), int(value), dtype=torch.int64, device=device)
    dist.all_reduce(holds)
    return holds > 0


def total(count: int) -> int | Tensor:
    """Sum of a per-rank count, e.g. of rows; at least 1 so that it can divide.

    With several ranks it stays on the device (int64 scalar): to read it is to wait for a GPU.
    """
    if not is_distributed():
        return max(count, 1)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = torch.full((), count, dtype=torch.int64, device=device)
    dist.all_reduce(counts)
    return counts.clamp_(min=1)


def log_total(count: int) -> float | Tensor:
    """Logarithm of ``total``."""
    summed = total(count)
    return summed.double().log() if isinstance(summed, Tensor) else math.log(summed)


def mean_over_rows(x: Tensor, rows: int | None = None) -> Tensor:
    """Mean over the rows of all ranks, ``(rows, K) -> (1, K)``: sums and counts, not mean of means.

    Args:
        x: rows, or partial sums of rows.
        rows: how many rows ``x`` adds up to; default: its own number of rows.
    """
    summed = x.sum(dim=0, keepdim=True)
    if is_distributed():
        dist.all_reduce(summed)
    return summed / total(len(x) if rows is None else rows)


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """``log sum exp`` over the rows of all ranks, ``(rows, K) -> (1, K)``; exact by max and sum."""
    if len(x):
        local = torch.logsumexp(x, dim=0, keepdim=True)
    else:
        local = x.new_full((1, x.shape[-1]), -torch.inf)
    if not is_distributed():
        return local
    peak = local.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    summed = (local - peak).exp()
    dist.all_reduce(summed)
    return peak + summed.log()


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
    """Join the group that ``torchrun`` announces in the environment, if any, and leave it again.

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
