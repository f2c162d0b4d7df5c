"""Retrieval scores of the revisited Oxford and Paris benchmark: rankings in, numbers out.

Every query has *easy*, *hard* and *junk* database images. Each difficulty calls some of them positive
and removes others from the ranking before anything is counted:

=========  ============  =============
difficulty positives     ignored
=========  ============  =============
easy       easy          junk and hard
medium     easy and hard junk
hard       hard          junk and easy
=========  ============  =============

Reference: Radenovic et al., Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking,
CVPR 2018 (arXiv 1803.11285), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DIFFICULTIES",
    "average_precision",
    "mean_average_precision",
    "precision_at",
    "query_scores",
    "rank_database",
    "revisited_scores",
    "split_difficulty",
]

#: difficulty -> (fields that hold its positives, fields that it ignores)
DIFFICULTIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_CUTOFFS = (1, 5, 10)


def rank_database(database: Tensor, queries: Tensor) -> NDArray[np.int64]:
    """Full ranking of the database for every query, by cosine similarity, best first.

    Args:
        database: features ``(database, D)``; normalized here.
        queries: features ``(queries, D)``; normalized here.

    Returns:
        int64 ``(database, queries)``: column ``q`` lists database indices, best first; equal
        similarities stay in database order.

    Example:
        >>> import torch
        >>> database = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> rank_database(database, torch.tensor([[2.0, 0.1]]))[:, 0].tolist()
        [1, 2, 0]
    """
    similarity = F.normalize(database, dim=1) @ F.normalize(queries, dim=1).T
    return similarity.argsort(dim=0, descending=True, stable=True).cpu().numpy()


def _indices(values: ArrayLike, name: str, query: int | None = None) -> NDArray[np.int64]:
    where = name if query is None else f"{name} of query {query}"
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(
            f"{where} must be a flat list of database indices (whole numbers from 0), "
            f"got shape {array.shape} of {array.dtype}"
        )
    if len(np.unique(array)) != len(array):
        raise ValueError(f"{where} name a database image twice")
    return array.astype(np.int64)


def _positions(
    ranking: NDArray[np.int64], positives: NDArray[np.int64], junk: NDArray[np.int64]
) -> NDArray[np.int64]:
    """0-based places of the positives once the junk has left the ranking."""
    kept = ranking[~np.isin(ranking, junk)]
    return np.flatnonzero(np.isin(kept, positives))


def _trapezoids(positions: NDArray[np.int64], total: int) -> float:
    found = np.arange(len(positions))
    after = (found + 1) / (positions + 1)
    before = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))
    return float((before + after).sum() / (2 * total))


def _precision(positions: NDArray[np.int64], k: int) -> float:
    if len(positions) == 0:
        return 0.0
    k = min(int(positions.max()) + 1, k)
    return float((positions < k).sum() / k)


def _checked(
    ranking: ArrayLike, positives: ArrayLike, junk: ArrayLike, query: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    wanted = _indices(positives, "positives", query)
    ignored = _indices(junk, "junk", query)
    both = np.intersect1d(wanted, ignored)
    if len(both):
        where = "" if query is None else f" of query {query}"
        raise ValueError(f"database image {both[0]} is both positive and junk{where}")
    return _indices(ranking, "ranks", query), wanted, ignored


def average_precision(ranking: ArrayLike, positives: ArrayLike, junk: ArrayLike = ()) -> float:
    """Area under one query's precision-recall curve, by trapezoids.

    A positive at 0-based place ``r`` (junk taken out) that is the ``j``-th found, from 0, adds
    ``(j / r + (j + 1) / (r + 1)) / 2`` (first fraction 1 at ``r = 0``) times ``1 / positives``.
    A positive that the ranking lacks adds nothing.

    Args:
        ranking: database indices, best first, each at most once.
        positives: indices of the images that should come first.
        junk: indices taken out of the ranking.

    Returns:
        A number in [0, 1], or nan without positives.

    Raises:
        ValueError: if indices are no whole numbers from 0, are repeated, or are in both lists.

    Example:
        >>> average_precision([7, 0, 1, 2], positives=[0, 2], junk=[7])
        0.7916666666666666
    """
    order, wanted, ignored = _checked(ranking, positives, junk)
    if len(wanted) == 0:
        return float("nan")
    return _trapezoids(_positions(order, wanted, ignored), len(wanted))


def precision_at(
    ranking: ArrayLike, positives: ArrayLike, junk: ArrayLike = (), *, k: int
) -> float:
    """Share of positives among the first ``k`` places of one ranking, junk taken out.

    As the benchmark has it, ``k`` never reaches past the last positive found: a query with two
    positives in places 1 and 2 has precision 1 at 10.

    Returns:
        A number in [0, 1], or nan without positives.

    Raises:
        ValueError: as ``average_precision``, or if ``k < 1``.

    Example:
        >>> precision_at([7, 0, 1, 2], positives=[0, 2], junk=[7], k=5)
        0.6666666666666666
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    order, wanted, ignored = _checked(ranking, positives, junk)
    if len(wanted) == 0:
        return float("nan")
    return _precision(_positions(order, wanted, ignored), k)


def query_scores(
    ranks: ArrayLike, positives: Sequence[ArrayLike], junk: Sequence[ArrayLike]
) -> dict[str, list[float]]:
    """``AP``, ``P@1``, ``P@5`` and ``P@10`` of every query; arguments as in mean_average_precision.

    Returns:
        One list per score with a number per query, nan for a query without positives.
    """
    table = np.asarray(ranks)
    if table.ndim != 2:
        raise ValueError(f"ranks must be (database, queries), got shape {table.shape}")
    if not table.shape[1] == len(positives) == len(junk):
        raise ValueError(
            f"ranks are (database, queries), best first down each column: {table.shape} has "
            f"{table.shape[1]} queries, but positives are given for {len(positives)} and junk for "
            f"{len(junk)}"
        )
    scores: dict[str, list[float]] = {"AP": [], **{f"P@{k}": [] for k in _CUTOFFS}}
    for query in range(table.shape[1]):
        order, wanted, ignored = _checked(table[:, query], positives[query], junk[query], query)
        if len(wanted) == 0:
            for values in scores.values():
                values.append(float("nan"))
            continue
        positions = _positions(order, wanted, ignored)
        scores["AP"].append(_trapezoids(positions, len(wanted)))
        for k in _CUTOFFS:
            scores[f"P@{k}"].append(_precision(positions, k))
    return scores


def _mean(values: list[float]) -> float:
    counted = [value for value in values if not np.isnan(value)]
    return float(np.mean(counted)) if counted else float("nan")


def mean_average_precision(
    ranks: ArrayLike, positives: Sequence[ArrayLike], junk: Sequence[ArrayLike]
) -> float:
    """mAP: the mean of ``average_precision`` over the queries that have a positive.

    Args:
        ranks: integers ``(database, queries)``: **column** ``q`` lists database indices, best first
            (the benchmark's own orientation, and what ``rank_database`` returns).
        positives: for every query, the indices of its positives.
        junk: for every query, the indices taken out of its ranking.

    Returns:
        A number in [0, 1], or nan if no query has a positive.

    Raises:
        ValueError: if the shapes do not fit together, or as ``average_precision``.

    Example:
        >>> ranks = np.array([[0, 3], [1, 2], [2, 1], [3, 0]])
        >>> mean_average_precision(ranks, positives=[[0, 1], [0]], junk=[[], [3, 2, 1]])
        1.0
    """
    return _mean(query_scores(ranks, positives, junk)["AP"])


def _field(truth: Mapping[str, Any], field: str, query: int) -> NDArray[np.int64]:
    if field not in truth:
        raise ValueError(
            f"ground truth of query {query} has no {field!r}: it must hold easy, hard and junk"
        )
    return _indices(truth[field], field, query)


def split_difficulty(
    ground_truth: Sequence[Mapping[str, Any]], difficulty: str
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """``(positives, junk)`` per query for ``easy``, ``medium`` or ``hard``.

    Raises:
        ValueError: for another difficulty, or if a query lacks easy, hard or junk.

    Example:
        >>> positives, junk = split_difficulty([{"easy": [1], "hard": [2], "junk": [3]}], "hard")
        >>> positives[0].tolist(), junk[0].tolist()
        ([2], [3, 1])
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty={difficulty!r} must be one of {', '.join(DIFFICULTIES)}")
    wanted, ignored = DIFFICULTIES[difficulty]
    positives, junk = [], []
    for query, truth in enumerate(ground_truth):
        positives.append(np.concatenate([_field(truth, field, query) for field in wanted]))
        junk.append(np.concatenate([_field(truth, field, query) for field in ignored]))
    return positives, junk


def revisited_scores(
    ranks: ArrayLike, ground_truth: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Easy, medium and hard scores of the revisited protocol.

    Args:
        ranks: integers ``(database, queries)``, best first down each column.
        ground_truth: for every query a mapping with ``easy``, ``hard`` and ``junk``: lists of
            database indices (more keys, such as ``bbx``, are let be).

    Returns:
        ``{"easy": s, "medium": s, "hard": s}`` with ``s = {"mAP", "mP@1", "mP@5", "mP@10"}``, in
        [0, 1]; means over the queries that have a positive there, nan if none has.

    Raises:
        ValueError: as ``mean_average_precision``, or if a query lacks a field.

    Example:
        >>> truth = [{"easy": [0], "hard": [2], "junk": [1]}]
        >>> scores = revisited_scores(np.array([[1], [0], [3], [2]]), truth)
        >>> {name: round(score["mAP"], 3) for name, score in scores.items()}
        {'easy': 1.0, 'medium': 0.792, 'hard': 0.25}
    """
    result = {}
    for difficulty in DIFFICULTIES:
        positives, junk = split_difficulty(ground_truth, difficulty)
        per_query = query_scores(ranks, positives, junk)
        result[difficulty] = {f"m{name}": _mean(values) for name, values in per_query.items()}
    return result
