"""Checks of features and labels, made before any long work."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NonFiniteFeaturesError", "check_features", "first_non_finite_row"]

_ROWS = 65536


class NonFiniteFeaturesError(ValueError):
    """Features hold a NaN or infinity: the backbone that made them is broken."""


def first_non_finite_row(features: Tensor) -> int | None:
    """Index of the first row with a NaN or infinity, or None; no second copy of ``features``.

    Example:
        >>> first_non_finite_row(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
        1
    """
    for start in range(0, len(features), _ROWS):
        rows = features[start : start + _ROWS]
        # the sum is many times cheaper than isfinite, and NaN and infinity survive it
        if not bool(rows.sum(dtype=torch.float32).isfinite()):
            bad = ~rows.isfinite().all(dim=1)
            if bool(bad.any()):
                return start + int(bad.nonzero()[0])
    return None


def check_features(features: Tensor, labels: Tensor, name: str) -> None:
    """Refuse features that do not fit their labels, are empty, or are not finite.

    Raises:
        ValueError: with the first fault; ``name`` says whose it is. NonFiniteFeaturesError for a NaN or
            infinity.
    """
    if features.ndim != 2:
        raise ValueError(
            f"{name} features must be (rows, dimensions), got shape {tuple(features.shape)}"
        )
    if labels.ndim != 1 or len(labels) != len(features):
        raise ValueError(
            f"{name}: {len(features)} features need as many labels in one dimension, got labels of "
            f"shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name} labels must be integers, got {labels.dtype}")
    if len(features) == 0:
        raise ValueError(f"{name}: there is no feature at all")
    bad = first_non_finite_row(features)
    if bad is not None:
        raise NonFiniteFeaturesError(
            f"{name} features hold a NaN or infinity (first in row {bad}): the backbone or the "
            "feature file is broken"
        )
