"""Weighted k-nearest-neighbor accuracy of frozen features, as the DINO paper measures it.

Protocol (DINO's kNN evaluation; the paper's Tables 1, 2 and 9-11): cosine similarity, the k nearest
training images vote for their class with weight ``exp(similarity / 0.07)``; k in {10, 20, 100, 200}.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dinovmf_plugin.features.checks import check_features
from dinovmf_plugin.features.neighbors import nearest_neighbors

__all__ = ["DEFAULT_KS", "DEFAULT_TEMPERATURE", "knn_accuracy", "vote_ranks"]

DEFAULT_KS = (10, 20, 100, 200)
DEFAULT_TEMPERATURE = 0.07


def vote_ranks(
    similarities: Tensor,
    neighbor_classes: Tensor,
    query_classes: Tensor,
    num_classes: int,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:
    """Rank of the true class (0 is best) among the votes of the ``k`` nearest, for every ``k``.

    Equal votes, those of classes without a neighbor included, are ranked by class index, as a stable
    sort of the votes does in the official code.

    Args:
        similarities: ``(Q, k_max)``, descending.
        neighbor_classes: ``(Q, k_max)`` int64 in ``0 .. num_classes - 1``.
        query_classes: ``(Q,)`` int64; -1 for a class that the bank does not have.
        num_classes: number of classes of the bank.
        ks: ascending numbers of neighbors.
        temperature: of the weights.

    Returns:
        ``{k: (Q,) int64}``; a query without a class in the bank has rank ``num_classes``.
    """
    similarities = similarities.double()
    # votes as logarithms, log sum exp per class around its own nearest: no temperature is too small
    nearest = similarities.new_full((len(similarities), num_classes), -torch.inf)
    total = torch.zeros_like(nearest)
    classes = torch.arange(num_classes, device=nearest.device)
    known = query_classes >= 0
    target = query_classes.clamp(min=0)[:, None]
    ranks, done = {}, 0
    for k in ks:
        new, members = similarities[:, done:k], neighbor_classes[:, done:k]
        nearest.scatter_reduce_(1, members, new, "amax")  # descending: a class keeps its first
        total.scatter_add_(1, members, ((new - nearest.gather(1, members)) / temperature).exp())
        done = k
        votes = nearest / temperature + total.log()
        own = votes.gather(1, target)
        before = (votes > own) | ((votes == own) & (classes < target))
        ranks[k] = torch.where(known, before.sum(dim=1), num_classes)
    return ranks


def _sorted_ks(ks: int | Sequence[int], bank_size: int) -> list[int]:
    values = sorted({ks} if isinstance(ks, int) else {int(k) for k in ks})
    if not values or values[0] < 1:
        raise ValueError(f"ks={ks} must name at least one number of neighbors, each at least 1")
    if values[-1] > bank_size:
        raise ValueError(
            f"ks={values} asks for {values[-1]} neighbors, but the bank holds only {bank_size} "
            f"features: use k <= {bank_size}"
        )
    return values


@torch.no_grad()
def knn_accuracy(
    bank_features: Tensor,
    bank_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    *,
    ks: int | Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    chunk: int = 4096,
    query_chunk: int = 1024,
    distributed: bool = False,
    progress: bool = False,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent for every ``k``, from one pass over the bank.

    Args:
        bank_features: ``(N, D)`` training features, any float dtype; normalized here, chunk by chunk.
        bank_labels: ``(N,)`` integers, any values (they need not be ``0 .. C - 1``).
        query_features: ``(Q, D)`` test features. Their device does the work.
        query_labels: ``(Q,)`` integers; a label that the bank lacks can never be hit.
        ks: numbers of neighbors, each at most ``N``.
        temperature: of the vote's weights ``exp(similarity / temperature)``, positive.
        chunk: bank rows per step.
        query_chunk: queries per block.
        distributed: share the queries between the ranks of the default process group. Every rank
            passes the same tensors and gets the same result.
        progress: show a progress bar.

    Returns:
        ``{k: (top1, top5)}`` in percent. Top-5 looks at the first ``min(5, k)`` classes, as DINO's.

    Raises:
        ValueError: if the shapes do not fit, a feature is not finite, there is no query, a ``k``
            exceeds the bank, or the temperature is not positive.

    Differs from upstream: query blocks of a fixed size (the official code divides the test set by 100
    and fails on smaller ones), labels of any value, one search for all k.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> labels = torch.tensor([7, 7, 3, 3])
        >>> query = torch.tensor([[2.0, 0.3], [0.2, 1.0]])
        >>> knn_accuracy(bank, labels, query, torch.tensor([7, 7]), ks=[1], temperature=0.07)
        {1: (50.0, 50.0)}
    """
    check_features(bank_features, bank_labels, "bank")
    check_features(query_features, query_labels, "query")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive (the protocol's is 0.07)")
    ordered = _sorted_ks(ks, len(bank_features))
    device = query_features.device
    classes, bank_classes = bank_labels.to(device).unique(return_inverse=True)
    position = torch.searchsorted(classes, query_labels.to(device)).clamp(max=len(classes) - 1)
    query_classes = torch.where(classes[position] == query_labels.to(device), position, -1)

    share = slice(dist.get_rank(), None, dist.get_world_size()) if distributed else slice(None)
    queries, query_classes = query_features[share], query_classes[share]
    similarities, indices = nearest_neighbors(
        bank_features, queries, ordered[-1], chunk=chunk, query_chunk=query_chunk, progress=progress
    )
    hits = torch.zeros((len(ordered), 2), dtype=torch.int64, device=device)
    for start in range(0, len(queries), query_chunk):
        rows = slice(start, start + query_chunk)
        ranks = vote_ranks(
            similarities[rows],
            bank_classes[indices[rows]],
            query_classes[rows],
            len(classes),
            ks=ordered,
            temperature=temperature,
        )
        for i, (k, rank) in enumerate(ranks.items()):
            named = min(5, k)
            hits[i] += torch.stack(
                [(rank < 1).sum(), ((rank < named) & (rank < len(classes))).sum()]
            )
    if distributed:
        dist.all_reduce(hits)
    percent = (100.0 * hits.double() / len(query_labels)).tolist()
    return {k: (top1, top5) for k, (top1, top5) in zip(ordered, percent, strict=True)}
