"""Does a component's precision tell how hard its images are? (paper section 5.2, Figure 2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["PercentileBin", "accuracy_by_percentile", "precision_trend"]


@dataclass(frozen=True)
class PercentileBin:
    """One percentile range of the images, sorted by the norm of their prototype.

    Attributes:
        low: lower percentile of the range.
        high: upper percentile.
        norm_min: smallest prototype norm ``||w_k||`` in it.
        norm_max: largest one.
        images: number of images.
        accuracy: share of them that are classified correctly, in percent.
    """

    low: float
    high: float
    norm_min: float
    norm_max: float
    images: int
    accuracy: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return asdict(self)


def _check(norms: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    norm = np.asarray(norms, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if norm.ndim != 1 or norm.shape != right.shape:
        raise ValueError(
            f"norms {norm.shape} and correct {right.shape} must be vectors with one entry per image"
        )
    if not np.isfinite(norm).all():
        raise ValueError("norms have NaN or infinite values: the prototypes are broken")
    return norm, right


def accuracy_by_percentile(
    norms: ArrayLike, correct: ArrayLike, bins: int = 10
) -> list[PercentileBin]:
    """Accuracy within equally large groups of images, from low to high precision.

    Images are sorted by the norm of the prototype that they are assigned to, ``kappa = ||w|| / tau``;
    ties, as when many images share a prototype, keep the images' order (stable sort).

    Args:
        norms: norm of each image's prototype, ``(N,)``.
        correct: whether each image is classified correctly, ``(N,)``, bool or 0/1.
        bins: number of groups; 10 gives deciles. Sizes differ by at most one image.

    Returns:
        ``bins`` groups in ascending order of norm.

    Raises:
        ValueError: if shapes differ, norms are not finite, or ``bins`` is not in ``1 .. N``.

    Example:
        >>> groups = accuracy_by_percentile([3.0, 1.0, 2.0, 4.0], [1, 0, 0, 1], bins=2)
        >>> [(g.low, g.high, g.accuracy) for g in groups]
        [(0.0, 50.0, 0.0), (50.0, 100.0, 100.0)]
    """
    norm, right = _check(norms, correct)
    if not 1 <= bins <= len(norm):
        raise ValueError(f"bins={bins} must lie between 1 and the number of images, {len(norm)}")
    order = np.argsort(norm, kind="stable")
    edges = np.linspace(0, 100, bins + 1)
    return [
        PercentileBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            norm_min=float(norm[part].min()),
            norm_max=float(norm[part].max()),
            images=len(part),
            accuracy=float(100 * right[part].mean()),
        )
        for i, part in enumerate(np.array_split(order, bins))
    ]


def precision_trend(norms: ArrayLike, correct: ArrayLike) -> dict[str, float]:
    """Spearman's rank correlation between prototype norm and correctness over single images.

    Positive where precise components hold easier images, as the paper reports for DINO-vMF. Needs
    no bins.

    Returns:
        ``{"spearman": .., "p_value": ..}``; NaN if the norms or the outcomes are all equal.

    Raises:
        ValueError: as ``accuracy_by_percentile``.

    Example:
        >>> precision_trend([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1])["spearman"] > 0.8
        True
    """
    norm, right = _check(norms, correct)
    if len(norm) < 2 or np.ptp(norm) == 0 or np.ptp(right) == 0:
        return {"spearman": float("nan"), "p_value": float("nan")}
    result = stats.spearmanr(norm, right)
    return {"spearman": float(result.statistic), "p_value": float(result.pvalue)}
