"""Exact cosine nearest neighbors, chunked so that ImageNet's bank fits a small machine.

A block of queries walks over the bank in chunks. Each chunk's similarities are thinned twice before
anything is sorted: groups of ``_GROUP`` neighbors whose maximum does not beat a query's current k-th
similarity are dropped whole, and of the rest only entries that beat it enter the query's reservoir.
The cost is the matrix product plus some per cent; nothing of size queries x bank is ever kept. 1,000 queries
against 1.28 M x 768 take 18 s of one core and 154 MB beside the bank (``results/benchmark_knn.json``).

This serves banks of every size. Below 100,000 rows faiss's flat index can be faster, but there a search takes
seconds at most, and a second backend would be a second rounding (faiss has no float16 bank), a second order
of equal similarities and a dependency: results would depend on which one served.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

__all__ = ["nearest_neighbors"]

_GROUP = 8
_FIRST = 4  # chunks in the first step: the better the first threshold, the less is ever looked at


def _grouped(similarity: Tensor, least: int = 1) -> Tensor:
    """``(rows, queries)`` as ``(groups, members, queries)``, at least ``least`` groups."""
    rows, queries = similarity.shape
    members = _GROUP if rows % _GROUP == 0 and rows // _GROUP >= least else 1
    return similarity.view(-1, members, queries)


class _Reservoir:
    """Candidates of a block of queries: at least the best ``k`` seen so far, in no order.

    Args:
        values: ``(queries, k)`` best similarities of the first rows, descending.
        ids: ``(queries, k)`` their bank indices.
        rows: of the bank per append, at most.
    """

    def __init__(self, values: Tensor, ids: Tensor, rows: int) -> None:
        queries, self.k = values.shape
        # compaction leaves k entries, and an append brings at most one per row;
        # what is not filled yet stays untouched memory, which costs nothing
        self.values = values.new_empty((queries, 2 * self.k + rows))
        self.ids = ids.new_empty(self.values.shape)
        self._keep(values, ids)

    def _keep(self, values: Tensor, ids: Tensor) -> None:
        self.values[:, : self.k], self.ids[:, : self.k] = values, ids
        self.fill = torch.full_like(ids[:, 0], self.k)
        self.threshold = values[:, -1].contiguous()

    def append(self, rows: Tensor, values: Tensor, ids: Tensor) -> None:
        """Add ``values[i]`` to query ``rows[i]``; any number per query up to one chunk."""
        counts = torch.bincount(rows, minlength=len(self.fill))
        if int((self.fill + counts).max()) > 2 * self.k:
            self._keep(*self.best())
        order = rows.argsort(stable=True)
        rows = rows[order]
        first = counts.cumsum(0) - counts
        position = torch.arange(len(rows), device=rows.device) - (first - self.fill)[rows]
        self.values[rows, position] = values[order]
        self.ids[rows, position] = ids[order]
        self.fill += counts

    def best(self) -> tuple[Tensor, Tensor]:
        """Values and bank indices of the best ``k``, ``(queries, k)`` each, descending."""
        width = int(self.fill.max())
        unfilled = torch.arange(width, device=self.fill.device) >= self.fill[:, None]
        values = self.values[:, :width].masked_fill(unfilled, -torch.inf)
        values, order = values.topk(self.k, dim=1)
        return values, self.ids[:, :width].gather(1, order)


def _best_of(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of every column of ``(rows, queries)`` and their rows, ``(queries, k)`` each."""
    groups = _grouped(similarity, k)
    # an entry outside the k groups with the largest maxima has k better ones inside
    group = groups.amax(dim=1).T.contiguous().topk(k, dim=1, sorted=False).indices
    columns = torch.arange(len(group), device=group.device)
    values = groups[group, :, columns[:, None]].flatten(1)
    members = torch.arange(groups.shape[1], device=group.device)
    rows = (group[..., None] * groups.shape[1] + members).flatten(1)
    best, order = values.topk(k, dim=1)
    return best, rows.gather(1, order)


def _search_block(queries: Tensor, bank: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Unit float32 ``queries (Q, D)`` against the raw ``bank (N, D)``."""

    def similarity(start: int, rows: int) -> Tensor:
        part = bank[start : start + rows].to(queries.device)
        # (bank, queries) and not its transpose: group maxima then run along contiguous memory
        return F.normalize(part.float(), dim=1) @ queries.T

    seen = max(_FIRST * chunk, k)
    reservoir = _Reservoir(*_best_of(similarity(0, seen), k), rows=chunk)
    for start in range(seen, len(bank), chunk):
        groups = _grouped(similarity(start, chunk))
        # what only equals the k-th best is not needed: k are held
        group, column = (groups.amax(dim=1) > reservoir.threshold).nonzero(as_tuple=True)
        values = groups[group, :, column]
        hit, member = (values > reservoir.threshold[column, None]).nonzero(as_tuple=True)
        ids = group[hit] * groups.shape[1] + member + start
        reservoir.append(column[hit], values[hit, member], ids)
    return reservoir.best()


@torch.no_grad()
def nearest_neighbors(
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
        bank: ``(N, D)`` features of any float dtype, not necessarily normalized; stays where it is,
            chunks travel to the device of ``queries``.
        queries: ``(Q, D)`` features.
        k: neighbors per query, at most ``N``.
        chunk: bank rows per step.
        query_chunk: queries per block; peak memory besides inputs and results is about
            ``query_chunk * (24 * chunk + 100 * k)`` bytes and two float32 copies of ``4 * chunk`` rows
            of the bank, whatever ``N`` and ``Q`` are.
        progress: show a progress bar with the rate in queries.

    Returns:
        Similarities ``(Q, k)`` float32 in descending order and bank indices ``(Q, k)`` int64. Which of
        several exactly equal rows is returned at the k-th place is not specified.

    Raises:
        ValueError: if ``k`` is not between 1 and ``N``, or the widths differ.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> similarity, index = nearest_neighbors(bank, torch.tensor([[5.0, 1.0]]), 2)
        >>> index.tolist()
        [[0, 2]]
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} must both be "
            "(rows, dimensions) with the same number of dimensions"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} neighbors were asked for, but the bank holds {len(bank)} rows")
    similarities = torch.empty((len(queries), k), device=queries.device)
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    with tqdm(total=len(queries), desc="kNN", unit="query", disable=not progress) as bar:
        for start in range(0, len(queries), query_chunk):
            rows = slice(start, start + query_chunk)
            block = F.normalize(queries[rows].float(), dim=1)
            similarities[rows], indices[rows] = _search_block(block, bank, k, chunk)
            bar.update(len(block))
    return similarities, indices
