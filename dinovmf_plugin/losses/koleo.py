"""A spread term that keeps vectors apart: KoLeo on prototype directions, or on features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["koleo_loss", "nearest_neighbors"]

_EPS = 1e-8
_CHUNK = 1024


@torch.no_grad()
def nearest_neighbors(directions: Tensor, anchors: Tensor | None = None) -> Tensor:
    """Index of the other direction with the largest cosine, for every anchor; exact, chunked.

    Args:
        directions: unit vectors ``(K, p)``, ``K >= 2``.
        anchors: int64 indices ``(A,)``; default all.

    Returns:
        int64 ``(A,)``; never the anchor itself, even among identical vectors.

    Example:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])).tolist()
        [1, 2, 1]
    """
    if anchors is None:
        anchors = torch.arange(len(directions), device=directions.device)
    found = []
    for chunk in anchors.split(_CHUNK):
        cosine = directions[chunk] @ directions.T
        cosine.scatter_(1, chunk.unsqueeze(1), -2.0)
        found.append(cosine.argmax(dim=1))
    return torch.cat(found)


def koleo_loss(
    directions: Tensor, *, num_anchors: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """``-mean_i log(min_{j != i} ||mu_i - mu_j||)``: small where directions are evenly spread.

    The Kozachenko-Leonenko entropy estimator up to constants: on features of images (arXiv 1806.03198, and
    DINOv2), or on prototypes, as the follow-up on partial prototype collapse (arXiv 2410.14060) proposes.
    Copies of one vector, such as a void set of prototypes, are what it penalizes; its gradient has the
    size of 1 / distance, so near-copies are pushed apart strongly, while *exact* copies have no direction
    to part in and get gradient zero.

    Cost: K * K * p for the neighbor search (no gradient, 1024 x K at a time) and K * p for the rest.
    K 8192 costs 34 GFLOP a step; at K 65536 draw ``num_anchors`` of them per step.

    Args:
        directions: prototypes ``(K, p)`` with gradient, e.g. ``Prototypes.directions()``, or features
            ``(N, D)`` of one crop of each image; normalized here. Computed in float32 with autocast off.
        num_anchors: use a random subset of prototypes ``i`` (their neighbors are searched among all):
            an unbiased estimate. Default all.
        generator: for the subset.

    Returns:
        Scalar, float32 (float64 if the input is).

    Raises:
        ValueError: for fewer than 2 rows, or ``num_anchors`` outside ``1 .. K``.

    Example:
        >>> spread = torch.eye(4)
        >>> bunched = spread + 10 * torch.ones(4)
        >>> bool(koleo_loss(spread) < koleo_loss(bunched))
        True
    """
    num = len(directions)
    if directions.ndim != 2 or num < 2:
        raise ValueError(
            f"directions have shape {tuple(directions.shape)}: at least 2 rows (K, p) are needed"
        )
    if num_anchors is not None and not 1 <= num_anchors <= num:
        raise ValueError(
            f"num_anchors={num_anchors} must lie in 1 .. {num}, the number of prototypes"
        )
    with torch.autocast(directions.device.type, enabled=False):
        if directions.dtype != torch.float64:
            directions = directions.float()
        unit = F.normalize(directions, dim=-1)
        if num_anchors is None:
            anchors = torch.arange(num, device=unit.device)
        else:
            device = generator.device if generator is not None else unit.device
            order = torch.randperm(num, generator=generator, device=device)
            anchors = order[:num_anchors].to(unit.device)
        neighbors = nearest_neighbors(unit, anchors)
        squared = (unit[anchors] - unit[neighbors]).square().sum(dim=-1)
        # inside the root, so that identical vectors give a finite value and gradient
        return -(squared + _EPS**2).sqrt().log().mean()
