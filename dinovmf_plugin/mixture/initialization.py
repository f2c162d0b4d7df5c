"""Where EM starts: spherical k-means++, and where a component starts again that has lost its rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike
from sklearn.cluster import kmeans_plusplus
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core.vmf import exact_log_normalizer, log_normalizer
from dinovmf_plugin.mixture.concentration import banerjee_concentration
from dinovmf_plugin.mixture.em import Parameters, chunk_rows, hard_statistics, maximization

__all__ = [
    "initialization_rows",
    "kmeans_plusplus_directions",
    "merge_directions",
    "seed_rows",
    "spherical_kmeans",
    "split_rows",
    "starting_parameters",
]

_MANY = 256  # components from which on fewer rows and seeds per component have to do
_LLOYD = 5
_PRIOR_ROWS = 10.0


def initialization_rows(num_components: int) -> int:
    """Rows on which a start is sought; with more of them, as many are drawn.

    Example:
        >>> initialization_rows(10), initialization_rows(4096)
        (20000, 32768)
    """
    return max(8 * num_components, 20_000)


def spherical_kmeans(
    x: Tensor, directions: Tensor, *, iterations: int = _LLOYD, weights: Tensor | None = None
) -> Tensor:
    """Lloyd's iterations on the sphere: assign by the largest cosine, average, normalize.

    Source: Dhillon and Modha, Machine Learning 42 (2001).

    Args:
        x: unit vectors ``(N, p)``.
        directions: unit vectors ``(K, p)`` to start from.
        iterations: at most so many.
        weights: of the rows, ``(N,)``; default: equal.

    Returns:
        Unit vectors ``(K, p)``, float64; a direction that no row belongs to stays where it was.

    Example:
        >>> x = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]]), dim=1)
        >>> spherical_kmeans(x, x[[0, 2]]).round(decimals=3).abs()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    weighted = x if weights is None else x * weights.to(x).unsqueeze(1)
    directions = directions.double()
    for _ in range(iterations):
        nearest = torch.cat([_nearest(rows, directions) for rows in _chunks(x, directions)])
        sums = torch.zeros_like(directions).index_add_(0, nearest, weighted.double())
        norms = sums.norm(dim=1, keepdim=True)
        moved = torch.where(norms > 0, sums / norms.clamp_min(1e-300), directions)
        if torch.equal(moved, directions):
            break
        directions = moved
    return directions


def _chunks(x: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
    return x.split(chunk_rows(*directions.shape))


def _nearest(x: Tensor, directions: Tensor) -> Tensor:
    return (x @ directions.to(x.dtype).T).argmax(dim=1)


def seed_rows(x: Tensor, seeds: int, random: RandomState) -> Tensor:
    """Draw seeds by k-means++: each with probability ``1 - max_j <x, c_j>`` of the seeds before it.

    On unit vectors this is half the squared distance. Source: Arthur and Vassilvitskii 2007.

    Args:
        x: unit vectors ``(N, p)``.
        seeds: how many.
        random: what draws.

    Returns:
        Rows of x, ``(seeds, p)``; some twice only if x has fewer different rows.

    Example:
        >>> seed_rows(torch.eye(3).repeat(4, 1), 3, RandomState(0)).sum(dim=0).tolist()
        [1.0, 1.0, 1.0]
    """
    chosen = [int(random.randint(len(x)))]
    distance = x.new_full((len(x),), torch.inf)
    while len(chosen) < seeds:
        distance = torch.minimum(distance, (1 - x @ x[chosen[-1]]).clamp_min_(0))
        cumulated = distance.double().cumsum(0)
        at = torch.tensor(random.uniform() * float(cumulated[-1]), dtype=torch.float64)
        chosen.append(min(int(torch.searchsorted(cumulated, at, right=True)), len(x) - 1))
    return x[chosen]


def merge_directions(counts: Tensor, sums: Tensor, num: int) -> Tensor:
    """Merge groups of rows, always the two that lose the least likelihood, until ``num`` are left.

    With ``l(n, s) = n (kappa r + D(kappa))``, ``r = ||s|| / n`` and ``A_p(kappa) = r``, joining two groups
    loses ``l(n_i, s_i) + l(n_j, s_j) - l(n_i + n_j, s_i + s_j)``. Concentrations are Banerjee's
    approximation; lengths are drawn to that of the average group by ten rows, as a group of one row would
    have an infinite one.

    Source: model-based agglomeration as a start of EM, Fraley and Raftery, JASA 97 (2002).

    Args:
        counts: rows of each group ``(M,)``, positive.
        sums: their sums ``(M, p)``, float64.
        num: groups to keep, at most M.

    Returns:
        Unit directions ``(num, p)``, float64.

    Example:
        >>> sums = torch.tensor([[3.0, 0.1], [3.0, -0.1], [0.0, 4.0]]).double()
        >>> merge_directions(torch.tensor([3.1, 3.1, 4.1]).double(), sums, 2)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    counts, sums = counts.clone(), sums.clone()
    average = float(sums.norm(dim=1).sum() / counts.sum())

    def likelihood(n: Tensor, norm: Tensor) -> Tensor:
        r = (norm + _PRIOR_ROWS * average) / (n + _PRIOR_ROWS)
        kappa = banerjee_concentration(r.clamp(max=1 - 1e-6), sums.shape[1])
        return n * (kappa * r + _log_normalizer(kappa, sums.shape[1]))

    own = likelihood(counts, sums.norm(dim=1))
    together = (sums @ sums.T) * 2 + (sums**2).sum(1) + (sums**2).sum(1, keepdim=True)
    pairs = counts + counts.unsqueeze(1)
    loss = own + own.unsqueeze(1) - likelihood(pairs, together.clamp_min(0).sqrt())
    loss.fill_diagonal_(torch.inf)
    alive = torch.ones(len(counts), dtype=torch.bool)
    for _ in range(len(counts) - num):
        i, j = divmod(int(loss.argmin()), len(counts))
        counts[i] += counts[j]
        sums[i] += sums[j]
        alive[j] = False
        own[i] = likelihood(counts[i], sums[i].norm())
        row = own + own[i] - likelihood(counts + counts[i], (sums + sums[i]).norm(dim=1))
        row[~alive] = torch.inf
        row[i] = torch.inf
        loss[i], loss[:, i] = row, row
        loss[j], loss[:, j] = torch.inf, torch.inf
    return F.normalize(sums[alive], dim=1)


def kmeans_plusplus_directions(x: Tensor, num_components: int, random: RandomState) -> Tensor:
    """Directions to start from: seeded too many, averaged, then merged to the number asked for.

    Single rows are poor seeds where a component is wide (in 256 dimensions two rows of one component may
    be almost orthogonal). So a multiple of the components is seeded by k-means++ and refined by spherical
    k-means, and ``merge_directions`` joins what belongs together; of more than 256 components, where
    all pairs are too many, greedy k-means++ and k-means choose among the averages (as in k-means||,
    Bahmani et al. 2012).

    Args:
        x: unit vectors ``(N, p)``, at least as many as components.
        num_components: ``K``.
        random: what draws.

    Returns:
        Unit vectors ``(K, p)``, float64.

    Raises:
        ValueError: if there are fewer rows than components.

    Example:
        >>> x = torch.eye(3).repeat(4, 1)
        >>> found = kmeans_plusplus_directions(x, 3, RandomState(0))
        >>> found.sum(dim=0).tolist()
        [1.0, 1.0, 1.0]
    """
    if len(x) < num_components:
        raise ValueError(f"{len(x)} rows are fewer than the {num_components} components")
    if num_components == 1:
        return spherical_kmeans(x, x[:1], iterations=1)
    few = num_components <= _MANY
    seeds = seed_rows(x, min((4 if few else 2) * num_components, len(x)), random)
    candidates = spherical_kmeans(x, seeds)
    groups = hard_statistics(_chunks(x, candidates), candidates)
    kept = groups.counts > 0
    if int(kept.sum()) < num_components:  # fewer different rows than components
        return F.normalize(seeds[:num_components].double(), dim=1)
    if few:
        return merge_directions(groups.counts[kept], groups.sums[kept], num_components)
    candidates, weights = candidates[kept], groups.counts[kept]
    chosen, _ = kmeans_plusplus(
        candidates.numpy(), num_components, sample_weight=weights.numpy(), random_state=random
    )
    return spherical_kmeans(candidates, torch.from_numpy(chosen), weights=weights)


def starting_parameters(
    x: Tensor,
    num_components: int,
    init: str | ArrayLike,
    random: RandomState,
    *,
    max_concentration: float,
) -> Parameters:
    """Parameters after one M step from the rows nearest to each starting direction.

    Args:
        x: unit vectors ``(N, p)``, at least as many as components.
        num_components: ``K``.
        init: ``k-means++``, ``random`` (rows of x) or directions ``(K, p)`` of any length.
        random: what draws.
        max_concentration: upper bound of the concentrations.

    Raises:
        ValueError: if directions are given that are not ``(K, p)``, or one of them is zero.

    Example:
        >>> x = torch.eye(3).repeat(4, 1)
        >>> given = [[2, 1, 0], [0, 5, 0], [0, 1, 3]]
        >>> start = starting_parameters(x, 3, given, RandomState(0), max_concentration=9.0)
        >>> start.directions.argmax(dim=1).tolist(), start.log_weights.exp().sum().round().item()
        ([0, 1, 2], 1.0)
    """
    dim = x.shape[1]
    if not isinstance(init, str):
        given = np.asarray(init, dtype=np.float64)
        if given.shape != (num_components, dim) or not given.any(axis=1).all():
            raise ValueError(
                f"init has shape {given.shape}: ({num_components}, {dim}) non-zero directions "
                "are needed, one per component"
            )
        directions = F.normalize(torch.from_numpy(given), dim=1)
    elif init == "random":
        chosen = random.choice(len(x), num_components, replace=False)
        directions = x[torch.from_numpy(chosen)].double()
    else:
        directions = kmeans_plusplus_directions(x, num_components, random)
    return maximization(
        hard_statistics(_chunks(x, directions), directions),
        directions,
        max_concentration=max_concentration,
    )


def _log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """By expansion; on the circle, which has none, exactly."""
    if dim >= 3:
        return log_normalizer(kappa, dim, order=2)
    return torch.from_numpy(exact_log_normalizer(kappa.numpy(), dim))


def split_rows(x: Tensor, responsibilities: Tensor, random: RandomState) -> tuple[Tensor, Tensor]:
    """Cut what one component holds of some rows in two, by spherical k-means.

    Args:
        x: unit vectors ``(N, p)``.
        responsibilities: the component's, ``(N,)``.
        random: what draws the rows.

    Returns:
        Two unit vectors ``(p,)``, float64: the means of the two halves; equal if there is one row only.

    Raises:
        ValueError: if no row belongs to the component.

    Example:
        >>> a, b = split_rows(torch.eye(2).repeat(8, 1), torch.ones(16), RandomState(0))
        >>> (a + b).tolist()
        [1.0, 1.0]
    """
    probability = responsibilities.double().numpy()
    if not probability.sum() > 0:
        raise ValueError("no row belongs to the component that is to be split")
    rows = random.choice(len(x), size=min(len(x), 1024), p=probability / probability.sum())
    held = x[torch.from_numpy(np.unique(rows))]
    if len(held) < 2:
        direction = F.normalize(held.double(), dim=1)[0]
        return direction, direction
    halves = spherical_kmeans(held, kmeans_plusplus_directions(held, 2, random), iterations=10)
    return halves[0], halves[1]
