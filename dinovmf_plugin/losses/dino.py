"""DINO's pairs of views on the shared soft-target cross-entropy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy

__all__ = ["dino_loss", "view_pairs"]


def view_pairs(num_targets: int, num_views: int) -> Tensor:
    """Weights ``(V, Q)`` of DINO's loss: 1 / pairs for every (student, teacher) view pair but the same.

    Example:
        >>> view_pairs(2, 3)
        tensor([[0.0000, 0.2500],
                [0.2500, 0.0000],
                [0.2500, 0.2500]])
        >>> int((view_pairs(2, 12) > 0).sum())
        22
    """
    pairs = 1.0 - torch.eye(num_views, num_targets)
    if not pairs.any():
        raise ValueError(
            f"{num_views} student and {num_targets} teacher views leave no pair of different views: "
            "augmentations must give at least two crops"
        )
    return pairs / pairs.sum()


@functools.lru_cache(maxsize=16)
def _view_pairs_on(num_targets: int, num_views: int, device: torch.device) -> Tensor:
    """Copied to the device once, not in every step."""
    return view_pairs(num_targets, num_views).to(device)


def dino_loss(
    student: Tensor, prototypes: Prototypes, targets: Tensor, temperature: float
) -> Tensor:
    """Mean cross-entropy over images and over pairs of different views (paper section 2).

    Args:
        student: unit vectors ``(V, B, p)`` of the student's views, the global ones first.
        prototypes: the student's prototypes.
        targets: teacher probabilities ``(Q, B, K)`` of the global views.
        temperature: the student's ``tau``.

    Returns:
        Scalar, float32.
    """
    pairs = _view_pairs_on(len(targets), len(student), student.device) / student.shape[1]
    return prototype_cross_entropy(
        student,
        prototypes.weight_v,
        targets,
        temperature=temperature,
        magnitude=prototypes.weight_g.squeeze(-1),
        bias=prototypes.log_normalizer(temperature),
        pair_weights=pairs,
    )
