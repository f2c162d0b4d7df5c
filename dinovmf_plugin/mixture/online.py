"""Online EM: sufficient statistics that forget, each component at the rate at which it receives rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinovmf_plugin.mixture.em import Statistics

__all__ = ["Memory", "remember"]


@dataclass(frozen=True)
class Memory:
    """What online EM knows of the rows so far.

    Attributes:
        counts: rows that each component remembers ``(K,)``, at most ``memory``.
        sums: their sum, weighted by responsibility, ``(K, p)``.
        usage: share of recent rows that belong to each component ``(K,)``, sums to 1.
        rows: rows that ``usage`` remembers, at most ``memory * K``.
    """

    counts: Tensor
    sums: Tensor
    usage: Tensor
    rows: float


def remember(old: Memory | None, batch: Statistics, memory: float) -> Memory:
    """Take in a batch, and forget as many older rows per component as the batch brought it.

    One row of responsibility ``r`` multiplies the component's statistics by ``(1 - 1 / memory)^r`` and
    then adds ``r`` of itself, so a component's mean and concentration always speak of about the last
    ``memory`` rows of its own, whenever these were, and one that receives none keeps what it knows.
    A batch counts as its rows one after the other: ``n`` rows weigh
    ``memory (1 - (1 - 1 / memory)^n)``, which is ``n`` for small batches and never exceeds the memory.
    Proportions must fade instead: ``usage`` forgets by rows, whoever they belong to, over
    ``memory * K`` of them.

    Source: stepwise EM, Cappe and Moulines, JRSS B 71 (2009). Differs from upstream: the step size is per
    component and follows its responsibilities.

    Args:
        old: the memory before, or None at the beginning.
        batch: statistics of the batch under the present parameters.
        memory: rows that a component remembers, at least 1; ``inf`` forgets nothing.

    Returns:
        The memory after.

    Raises:
        ValueError: if ``memory`` is below 1 or the batch is empty.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> a = Statistics(torch.tensor([4.0, 4.0]), torch.ones(2, 3), zero, 8)
        >>> b = Statistics(torch.tensor([8.0, 0.0]), torch.ones(2, 3), zero, 8)
        >>> remember(remember(None, a, math.inf), b, math.inf).counts
        tensor([12.,  4.])
        >>> remember(remember(None, a, 4.0), b, 4.0).counts.round(decimals=3)  # never above 4
        tensor([3.8730, 2.7340])
    """
    if not memory >= 1:
        raise ValueError(f"memory={memory} must be at least 1 row per component")
    if batch.rows < 1:
        raise ValueError("the batch has no rows")
    keep, mass = _forgetting(batch.counts, memory)
    # mean of the batch's rows times their mass; a component without any adds nothing
    share = torch.where(batch.counts > 0, mass / batch.counts, torch.zeros_like(mass))
    sums = share.unsqueeze(1) * batch.sums
    new_usage = batch.counts / batch.counts.sum()
    keep_rows, mass_rows = _forgetting(
        torch.tensor(float(batch.rows), dtype=torch.float64), memory * len(mass)
    )
    if old is None:
        return Memory(mass, sums, new_usage, float(mass_rows))
    rows = float(keep_rows) * old.rows + float(mass_rows)
    usage = old.usage + (new_usage - old.usage) * (float(mass_rows) / rows)
    return Memory(
        keep * old.counts + mass, keep.unsqueeze(1) * old.sums + sums, usage / usage.sum(), rows
    )


def _forgetting(rows: Tensor, memory: float) -> tuple[Tensor, Tensor]:
    """What is kept of older rows after ``rows`` new ones, and what these weigh."""
    if math.isinf(memory):
        return torch.ones_like(rows), rows
    rate = math.log1p(-1 / memory) if memory > 1 else -math.inf
    keep = torch.where(rows > 0, (rows * rate).exp(), torch.ones_like(rows))
    return keep, -memory * torch.where(rows > 0, (rows * rate).expm1(), torch.zeros_like(rows))
