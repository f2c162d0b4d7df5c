"""A KoLeo-style spread of the prototypes: optional, off by default."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["nearest_neighbors", "prototype_spread"]


@torch.no_grad()
def nearest_neighbors(directions: Tensor, chunk: int = 2048) -> Tensor:
    """Index of every unit vector's nearest other one, ``(K,)``; memory ``chunk * K``."""
    out = []
    for start in range(0, len(directions), chunk):
        similarity = directions[start : start + chunk] @ directions.T
        rows = torch.arange(len(similarity), device=directions.device)
        similarity[rows, rows + start] = -2.0
        out.append(similarity.argmax(dim=1))
    return torch.cat(out)


def prototype_spread(weight_v: Tensor, eps: float = 1e-8) -> Tensor:
    """``-mean_k log(distance of direction k to its nearest neighbour + eps)``, float32.

    Minimising it pushes coinciding prototypes apart (follow-up of the paper, arXiv 2410.14060). The
    neighbours are found without gradient, the distances have one.

    Args:
        weight_v: prototype directions ``(K, p)`` of any length, ``K >= 2``.
        eps: keeps the logarithm finite for exact duplicates (which then have no gradient direction).

    Example:
        >>> round(float(prototype_spread(torch.eye(4))), 4)
        -0.3466
    """
    with torch.autocast(weight_v.device.type, enabled=False):
        directions = F.normalize(weight_v.float(), dim=-1)
        neighbors = nearest_neighbors(directions)
        distances = (directions - directions[neighbors]).norm(dim=-1)
        return -torch.log(distances + eps).mean()
