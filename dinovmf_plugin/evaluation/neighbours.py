"""Exact cosine nearest neighbours, chunked so that ImageNet's bank fits a small machine.

A block of queries walks over the bank in chunks. Each chunk's similarities are thinned twice before
anything is sorted: groups of ``_GROUP`` neighbours whose maximum does not beat a query's current k-th
similarity are dropped whole, and of the rest only entries that beat it enter the query's reservoir.
The cost is the matrix product plus a few per cent; nothing of size queries x bank is ever kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

__all__ = ["nearest_neighbours"]

_GROUP = 8


class _Reservoir:
    """Candidates of a block of queries: at least the best ``k`` seen so far, in no order."""

    def __init__(self, similarity: Tensor, k: int) -> None:
        """Starts from the first chunk's ``similarity (chunk, queries)``, ``chunk >= k``."""
        chunk, queries = similarity.shape
        # an append brings at most one chunk, and compaction keeps the fill at or below self.room
        self.k, self.room = k, k + chunk
        self.values = similarity.new_full((queries, k + 2 * chunk), -torch.inf)
        self.ids = torch.zeros_like(self.values, dtype=torch.int64)
        self.fill = torch.full((queries,), k, device=similarity.device)
        best = similarity.T.contiguous().topk(k, dim=1, sorted=False)
        self.values[:, :k], self.ids[:, :k] = best.values, best.indices
        self.threshold = best.values.amin(dim=1)

    def append(self, rows: Tensor, values: Tensor, ids: Tensor) -> None:
        """Adds ``values[i]`` to query ``rows[i]``; any number per query up to one chunk."""
        counts = torch.bincount(rows, minlength=len(self.fill))
        order = rows.argsort(stable=True)
        rows = rows[order]
        first = counts.cumsum(0) - counts
        position = torch.arange(len(rows), device=rows.device) - (first - self.fill)[rows]
        self.values[rows, position] = values[order]
        self.ids[rows, position] = ids[order]
        self.fill += counts
        if int(self.fill.max()) > min(self.room, 3 * self.k):
            best = self.best()
            self.values[:, self.k : int(self.fill.max())] = -torch.inf
            self.values[:, : self.k], self.ids[:, : self.k] = best
            self.fill.fill_(self.k)
            self.threshold = best[0][:, -1].contiguous()

    def best(self) -> tuple[Tensor, Tensor]:
        """Values and bank indices of the best ``k``, ``(queries, k)`` each, descending."""
        width = int(self.fill.max())
        values, order = self.values[:, :width].topk(self.k, dim=1)
        return values, self.ids[:, :width].gather(1, order)


def _search_block(queries: Tensor, bank: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Unit float32 ``queries (Q, D)`` against the raw ``bank (N, D)``."""
    reservoir: _Reservoir | None = None
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk].to(queries.device)
        # (bank, queries) and not its transpose: group maxima then run along contiguous memory
        similarity = F.normalize(part.float(), dim=1) @ queries.T
        if reservoir is None:
            reservoir = _Reservoir(similarity, k)
            continue
        group = _GROUP if len(part) % _GROUP == 0 else 1
        blocks = similarity.view(-1, group, len(queries))
        block_ids, columns = (blocks.amax(dim=1) > reservoir.threshold).nonzero(as_tuple=True)
        values = blocks[block_ids, :, columns]
        hit, offset = (values > reservoir.threshold[columns, None]).nonzero(as_tuple=True)
        reservoir.append(columns[hit], values[hit, offset], block_ids[hit] * group + offset + start)
    assert reservoir is not None  # the bank holds at least k >= 1 rows
    return reservoir.best()


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    chunk: int = 4096,
    query_chunk: int = 1024,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most cosine-similar bank rows of every query, exactly.

    Args:
        bank: ``(N, D)`` features of any float dtype, not necessarily normalised; stays where it is,
            chunks travel to the device of ``queries``.
        queries: ``(Q, D)`` features.
        k: neighbours per query, at most ``N``.
        chunk: bank rows per step.
        query_chunk: queries per block; peak memory besides the inputs is about
            ``query_chunk * (k + 3 * chunk) * 12`` bytes.
        progress: show a progress bar with the rate in queries.

    Returns:
        Similarities ``(Q, k)`` float32 in descending order and bank indices ``(Q, k)`` int64. Which of
        several exactly equal rows is returned at the k-th place is not specified.

    Raises:
        ValueError: if ``k`` is not between 1 and ``N``, or the widths differ.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> similarity, index = nearest_neighbours(bank, torch.tensor([[5.0, 1.0]]), 2)
        >>> index.tolist()
        [[0, 2]]
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} must both be "
            "(rows, dimensions) with the same number of dimensions"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} neighbours were asked for, but the bank holds {len(bank)} rows")
    similarities = torch.empty((len(queries), k), device=queries.device)
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    with tqdm(total=len(queries), desc="kNN", unit="query", disable=not progress) as bar:
        for start in range(0, len(queries), query_chunk):
            rows = slice(start, start + query_chunk)
            block = F.normalize(queries[rows].float(), dim=1)
            similarities[rows], indices[rows] = _search_block(block, bank, k, max(chunk, k))
            bar.update(len(block))
    return similarities, indices
