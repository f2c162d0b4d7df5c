"""Which prototypes are used, and which are copies of each other (paper section 5.2, A.3, Table 4).

Two prototypes are duplicates if the cosine of their directions is *greater* than a threshold
(the paper: 0.9). "Unique" counts what is left once duplicates are removed. Two readings of that:

* **greedy cover** (``duplicate_groups``, the primary one): the lowest-index prototype that is not yet
  covered represents a group and absorbs every uncovered prototype above the threshold;
* **connected components** (``component_groups``, a check): chains of neighbors are one group, so
  distant prototypes can merge.

They agree when groups are tight against the threshold, as void sets are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csgraph
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

__all__ = ["VoidSet", "component_groups", "duplicate_groups", "utilization", "void_set"]

_BLOCK = 256
_PAIRS = 1 << 14


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: both would move cosines by 1e-3, across thresholds like 0.99."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(directions: Tensor, threshold: float) -> Tensor:
    if directions.ndim != 2 or 0 in directions.shape:
        raise ValueError(
            f"directions have shape {tuple(directions.shape)}: a (K, p) matrix with one prototype "
            "per row is needed"
        )
    if not -1 <= threshold < 1:
        raise ValueError(
            f"threshold={threshold} is not a cosine in [-1, 1): the paper uses 0.9 (a distance "
            "epsilon as in follow-up papers is 1 - threshold)"
        )
    directions = directions.detach()
    if directions.dtype != torch.float64:
        directions = directions.float()
    if not bool(torch.isfinite(directions).all()):
        raise ValueError("directions have NaN or infinite values: the prototypes are broken")
    return directions


class _Cosines:
    """``cos(i, j) > threshold`` for blocks of index pairs, decided as float64 would.

    Products are float32; a pair closer to the threshold than their rounding error is computed again
    in float64. So the outcome depends neither on block sizes nor on the device's matrix kernels.
    """

    def __init__(self, directions: Tensor, threshold: float) -> None:
        self.exact = directions
        self.threshold = threshold
        self.unit = F.normalize(directions, dim=-1)
        # bound of a dot product's rounding error, plus that of the normalization
        self.margin = (directions.shape[-1] + 8) * torch.finfo(directions.dtype).eps / 2

    def exceed(self, rows: Tensor, columns: Tensor, column_units: Tensor | None = None) -> Tensor:
        """Bool ``(len(rows), len(columns))``; ``column_units`` avoids gathering the columns again."""
        if column_units is None:
            column_units = self.unit[columns]
        cosine = self.unit[rows] @ column_units.T
        above = cosine > self.threshold + self.margin
        near = (cosine > self.threshold - self.margin) & ~above
        del cosine
        if bool(near.any()):
            for pairs in near.nonzero().split(_PAIRS):
                i, j = pairs.unbind(1)
                a, b = self.exact[rows[i]].double(), self.exact[columns[j]].double()
                value = (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
                above[i, j] = value > self.threshold
        return above


def duplicate_groups(directions: Tensor, threshold: float, *, progress: bool = False) -> Tensor:
    """Greedy cover: the group of every prototype, groups numbered in the order of their representatives.

    The uncovered prototype of lowest index becomes the representative of the next group and absorbs
    every uncovered prototype whose cosine with it is greater than ``threshold``. Hence group 0 is
    represented by prototype 0, and a group's representative is its lowest index.

    The K x K matrix is never formed: candidates are the first 256 uncovered prototypes, multiplied
    with all uncovered ones; time is proportional to groups * K * p, memory to 256 * K.

    Args:
        directions: prototypes ``(K, p)``, any norms (normalized here); float64 stays float64.
        threshold: cosine in [-1, 1), compared strictly.
        progress: whether to show a progress bar.

    Returns:
        int64 ``(K,)``, values ``0 .. unique - 1``, on the CPU.

    Raises:
        ValueError: for a wrong shape, a threshold outside [-1, 1), or non-finite values.

    Example:
        >>> a, b = [1.0, 0.0], [0.0, 1.0]
        >>> duplicate_groups(torch.tensor([a, b, a, b, b]), 0.9).tolist()
        [0, 1, 0, 1, 1]
    """
    directions = _check(directions, threshold)
    num = len(directions)
    groups = np.full(num, -1, dtype=np.int64)
    found = 0
    with _full_float32(directions.device), _bar(num, threshold, progress) as bar:
        cosines = _Cosines(directions, threshold)
        index = torch.arange(num, device=directions.device)
        units = cosines.unit
        while len(index):
            candidates = min(_BLOCK, len(index))
            above = cosines.exceed(index[:candidates], index, units).cpu().numpy()
            assigned, found = _walk(above, found)
            covered = assigned >= 0
            groups[index.cpu().numpy()[covered]] = assigned[covered]
            bar.update(int(covered.sum()))
            if covered.sum() == candidates:  # nobody absorbed: slices need no copy
                index, units = index[candidates:], units[candidates:]
            else:
                left = torch.from_numpy(np.flatnonzero(~covered)).to(index.device)
                index, units = index[left], units[left]
    return torch.from_numpy(groups)


def _walk(above: NDArray[np.bool_], found: int) -> tuple[NDArray[np.int64], int]:
    """One block of the cover: the first rows of the columns are the candidates, in order."""
    assigned = np.full(above.shape[1], -1, dtype=np.int64)
    absorbs = above.sum(axis=1) > 1
    for i, row in enumerate(above):
        if assigned[i] >= 0:
            continue
        if absorbs[i]:
            assigned[row & (assigned < 0)] = found
        assigned[i] = found
        found += 1
    return assigned, found


def component_groups(directions: Tensor, threshold: float, *, progress: bool = False) -> Tensor:
    """Connected components of the graph that joins prototypes with cosine above the threshold.

    A greedy group lies in one component (its members all touch the representative), so only links
    *between* groups are searched, and only where the triangle inequality of angles lets one exist.

    Args:
        directions: as in ``duplicate_groups``.
        threshold: as in ``duplicate_groups``.
        progress: whether to show a progress bar.

    Returns:
        int64 ``(K,)``, components numbered by their lowest index, on the CPU.

    Raises:
        ValueError: as ``duplicate_groups``.

    Example:
        >>> angles = torch.tensor([0.0, 0.5, 1.0, 3.0])
        >>> points = torch.stack([angles.cos(), angles.sin()], dim=-1)
        >>> duplicate_groups(points, 0.8).tolist(), component_groups(points, 0.8).tolist()
        ([0, 0, 1, 2], [0, 0, 0, 1])
    """
    directions = _check(directions, threshold)
    device = directions.device
    groups = duplicate_groups(directions, threshold, progress=progress).to(device)
    sizes = torch.bincount(groups)
    label = torch.arange(len(sizes), device=device)
    # two representatives are never joined, so a link has an end in a group of several
    rows = (sizes[groups] > 1).nonzero().squeeze(1)
    with _full_float32(device), _bar(len(rows), threshold, progress, "links") as bar:
        cosines = _Cosines(directions, threshold)
        representatives = torch.from_numpy(_representatives(groups)).to(device)
        own = (cosines.unit * cosines.unit[representatives[groups]]).sum(-1).clamp(-1, 1).arccos()
        radius = torch.zeros(len(sizes), dtype=own.dtype, device=device)
        radius.scatter_reduce_(0, groups, own, "amax")
        # 2e-3 rad: arccos near 1 turns float32's 1e-7 into 5e-4
        reach = (radius + math.acos(threshold) + 2e-3).clamp_max(math.pi).cos()
        for block in rows.split(_BLOCK):
            close = cosines.unit[block] @ cosines.unit[representatives].T >= reach
            close &= label[groups[block]].unsqueeze(1) != label
            if bool(close.any()):
                near = block[close.any(dim=1)]
                columns = close.any(dim=0)[groups].nonzero().squeeze(1)
                label = _join(cosines.exceed(near, columns), near, columns, groups, label)
            bar.update(len(block))
    return torch.from_numpy(_renumber(label[groups].cpu().numpy()))


def _join(above: Tensor, rows: Tensor, columns: Tensor, groups: Tensor, label: Tensor) -> Tensor:
    """Labels of the groups after the links of one block."""
    of_row, of_column = label[groups[rows]], label[groups[columns]]
    above &= of_row.unsqueeze(1) != of_column
    i, j = above.nonzero(as_tuple=True)
    links = torch.stack([of_row[i], of_column[j]]).unique(dim=1).cpu().numpy()
    graph = coo_array((np.ones(links.shape[1]), (links[0], links[1])), shape=(len(label),) * 2)
    _, component = csgraph.connected_components(graph, directed=False)
    return torch.from_numpy(component.astype(np.int64)).to(label.device)[label]


def _representatives(groups: Tensor) -> NDArray[np.int64]:
    return np.unique(groups.cpu().numpy(), return_index=True)[1]


def _renumber(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same partition, numbered by lowest index."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _bar(total: int, threshold: float, progress: bool, what: str = "prototypes") -> tqdm[None]:
    return tqdm(total=total, desc=f"{what} at cos > {threshold:g}", unit="", disable=not progress)


def utilization(
    directions: Tensor,
    thresholds: Sequence[float],
    *,
    method: Literal["greedy", "components"] = "greedy",
    progress: bool = False,
) -> dict[float, dict[str, int]]:
    """Unique prototypes and the size of the largest duplicate set (Table 4, Figures 6 and 7).

    Args:
        directions: prototypes ``(K, p)``.
        thresholds: cosines; every one is computed anew, since covers are not nested.
        method: ``greedy`` or ``components``.
        progress: whether to show progress bars.

    Returns:
        ``{threshold: {"unique": .., "largest": ..}}`` in the order given.

    Raises:
        ValueError: as ``duplicate_groups``, or for an unknown method.

    Example:
        >>> utilization(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), [0.9])
        {0.9: {'unique': 2, 'largest': 2}}
    """
    readings = {"greedy": duplicate_groups, "components": component_groups}
    if method not in readings:
        raise ValueError(f"method={method!r} is unknown: choose one of {tuple(readings)}")
    out = {}
    for threshold in thresholds:
        sizes = torch.bincount(readings[method](directions, threshold, progress=progress))
        out[threshold] = {"unique": len(sizes), "largest": int(sizes.max())}
    return out


@dataclass(frozen=True)
class VoidSet:
    """The largest duplicate set, and whether it is the paper's void set.

    Attributes:
        representative: index of its lowest member.
        size: number of prototypes in it.
        share: ``size / K``.
        cosine_with_mean: cosine of the representative with the mean of ``y``; -1 in a void set.
        hits: images whose most probable component lies in the set; 0 in a void set.
        images: images that were assigned.
    """

    representative: int
    size: int
    share: float
    cosine_with_mean: float
    hits: int
    images: int

    @property
    def is_void(self) -> bool:
        """Several prototypes, opposite to the data (cosine below -0.9), that win no image."""
        return self.size > 1 and self.cosine_with_mean < -0.9 and self.hits == 0


def void_set(directions: Tensor, groups: Tensor, mean: Tensor, hits: Tensor) -> VoidSet:
    """Describe the largest duplicate set (of several, the one with the lowest index).

    Args:
        directions: prototypes ``(K, p)``.
        groups: ``(K,)`` of ``duplicate_groups``.
        mean: mean of ``y`` over the data ``(p,)``, any norm.
        hits: images per prototype, ``(K,)``: arg-max of the teacher's logits without center.

    Returns:
        A ``VoidSet``.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> found = void_set(
        ...     directions,
        ...     duplicate_groups(directions, 0.9),
        ...     mean=torch.tensor([0.5, 0.0]),
        ...     hits=torch.tensor([7, 0, 0]),
        ... )
        >>> found.size, found.cosine_with_mean, found.is_void
        (2, -1.0, True)
    """
    num, dim = directions.shape
    if groups.shape != (num,) or hits.shape != (num,) or mean.shape != (dim,):
        raise ValueError(
            f"for {num} prototypes of {dim} dimensions, groups and hits must have shape ({num},) and "
            f"mean ({dim},), not {tuple(groups.shape)}, {tuple(hits.shape)} and {tuple(mean.shape)}"
        )
    groups, hits = groups.cpu(), hits.cpu()
    largest = int(torch.bincount(groups).argmax())
    members = groups == largest
    representative = int(members.nonzero()[0])
    cosine = F.cosine_similarity(
        directions[representative].double(), mean.to(directions.device).double(), dim=0
    )
    return VoidSet(
        representative=representative,
        size=int(members.sum()),
        share=float(members.double().mean()),
        cosine_with_mean=float(cosine),
        hits=int(hits[members].sum()),
        images=int(hits.sum()),
    )
