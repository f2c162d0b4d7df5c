"""Region and contour accuracy of DAVIS-2017's semi-supervised protocol: masks in, numbers out.

Every object of the first frame is followed through the sequence; each frame but the first (given)
and the last (not scored) gets ``J``, the region similarity, and ``F``, the contour accuracy.

References:
    - Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation,
      CVPR 2016, section 4.
    - Pont-Tuset et al., The 2017 DAVIS Challenge, arXiv 1704.00675.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

__all__ = [
    "contour_accuracy",
    "mask_contour",
    "mean_recall_decay",
    "region_similarity",
    "score_sequence",
    "summarize_objects",
]

#: Distance that contours may be apart, as a share of the image's diagonal.
TOLERANCE = 0.008


def _binary(mask: ArrayLike, name: str) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"{name} must be one frame (height, width), got shape {array.shape}")
    if array.dtype != np.bool_:
        foreground = array != 0
        if foreground.any() and len(np.unique(array[foreground])) > 1:
            raise ValueError(
                f"{name} holds several labels: pass one object at a time, such as mask == 1"
            )
        return foreground
    return array


def _pair(mask: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    predicted, wanted = _binary(mask, "mask"), _binary(truth, "truth")
    if predicted.shape != wanted.shape:
        raise ValueError(f"mask is {predicted.shape}, but truth is {wanted.shape}")
    return predicted, wanted


def region_similarity(mask: ArrayLike, truth: ArrayLike) -> float:
    """``J``: intersection over union of two masks; 1 if both are empty.

    Args:
        mask: predicted object ``(H, W)``: bool, or 0 and one other number.
        truth: annotated object, of the same size.

    Raises:
        ValueError: if the sizes differ, or a mask holds several labels.

    Example:
        >>> region_similarity([[1, 1], [0, 0]], [[1, 0], [1, 0]])
        0.3333333333333333
    """
    predicted, wanted = _pair(mask, truth)
    union = np.count_nonzero(predicted | wanted)
    return float(np.count_nonzero(predicted & wanted) / union) if union else 1.0


def mask_contour(mask: ArrayLike) -> NDArray[np.bool_]:
    """One-pixel contour: pixels that differ from the one to the right, below, or below right.

    Neighbors outside the image count as equal, so the image's edge is no contour.

    Example:
        >>> mask_contour([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).astype(int)
        array([[1, 1, 0],
               [1, 1, 0],
               [0, 0, 0]])
    """
    inside = _binary(mask, "mask")
    padded = np.pad(inside, ((0, 1), (0, 1)), mode="edge")
    right, below, corner = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (inside != right) | (inside != below) | (inside != corner)


def _share_near(points: NDArray[np.int64], others: NDArray[np.int64], radius: int) -> float:
    """Share of ``points`` with one of ``others`` within ``radius`` pixels (a disc)."""
    distance, _ = cKDTree(others).query(points, distance_upper_bound=radius + 0.5)
    return float(np.mean(distance <= radius))


def contour_accuracy(mask: ArrayLike, truth: ArrayLike, *, tolerance: float = TOLERANCE) -> float:
    """``F``: harmonic mean of precision and recall of the contour pixels.

    A contour pixel is right if the other contour has one within ``ceil(tolerance * diagonal)``
    pixels. Two masks without contour score 1; if only one has a contour, the score is 0.

    Args:
        mask: predicted object ``(H, W)``: bool, or 0 and one other number.
        truth: annotated object, of the same size.
        tolerance: share of the image's diagonal (DAVIS: 0.008, 8 pixels at 480 x 854).

    Raises:
        ValueError: if the sizes differ, a mask holds several labels, or the tolerance is negative.

    Example:
        >>> truth = np.zeros((60, 60), dtype=bool)
        >>> truth[20:40, 20:40] = True
        >>> contour_accuracy(np.roll(truth, 1, axis=1), truth), contour_accuracy(truth & False, truth)
        (1.0, 0.0)
    """
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must not be negative")
    predicted, wanted = _pair(mask, truth)
    radius = math.ceil(tolerance * math.hypot(*predicted.shape))
    points, targets = (np.argwhere(mask_contour(side)) for side in (predicted, wanted))
    if not len(points) and not len(targets):
        return 1.0
    if not len(points) or not len(targets):
        return 0.0
    precision = _share_near(points, targets, radius)
    recall = _share_near(targets, points, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean_recall_decay(values: Sequence[float]) -> dict[str, float]:
    """Mean, recall and decay of one object's scores over the frames of a sequence.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter minus that of the
    last; the quarters share their border frames, as DAVIS counts them.

    Raises:
        ValueError: if there are no frames.

    Example:
        >>> mean_recall_decay([1.0, 0.8, 0.6, 0.4, 0.2])
        {'mean': 0.6, 'recall': 0.6, 'decay': 0.6}
    """
    scores = np.asarray(values, dtype=np.float64)
    if not len(scores):
        raise ValueError("no frames were scored: a sequence needs at least 3")
    # 1e-10 rounds halves up, where NumPy would round them to even
    edges = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(np.int64) - 1
    first, last = scores[: edges[1] + 1], scores[edges[3] : edges[4] + 1]
    return {
        "mean": float(scores.mean()),
        "recall": float((scores > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def score_sequence(
    predicted: Sequence[NDArray[np.integer]], truth: Sequence[NDArray[np.integer]]
) -> dict[int, dict[str, dict[str, float]]]:
    """Score every object of one sequence.

    Args:
        predicted: label numbers ``(H, W)`` of every frame.
        truth: annotated label numbers, of the same frames. Objects are the labels of the first
            frame except 0 (background) and 255 (void, which counts as background).

    Returns:
        ``{object: {"J": s, "F": s}}`` with ``s = {"mean", "recall", "decay"}`` over the frames but
        the first and the last.

    Raises:
        ValueError: if frames are missing or differ in size, or the first shows no object.

    Differs from upstream: an object number that the first frame skips is not scored; the official
    tool scores it as a perfectly tracked empty object. DAVIS itself skips none.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted frames, but {len(truth)} annotated ones")
    if len(truth) < 3:
        raise ValueError(
            f"a sequence of {len(truth)} frames cannot be scored: the first and the last are left out"
        )
    objects = sorted(set(np.unique(truth[0]).tolist()) - {0, 255})
    if not objects:
        raise ValueError("the first annotated frame shows no object")
    scores: dict[int, dict[str, dict[str, float]]] = {}
    for number in objects:
        regions, contours = [], []
        for ours, theirs in zip(predicted[1:-1], truth[1:-1], strict=True):
            regions.append(region_similarity(ours == number, theirs == number))
            contours.append(contour_accuracy(ours == number, theirs == number))
        scores[number] = {"J": mean_recall_decay(regions), "F": mean_recall_decay(contours)}
    return scores


def summarize_objects(objects: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """DAVIS's seven global numbers: means over all objects of all sequences.

    Args:
        objects: the values of ``score_sequence``, of every sequence.

    Returns:
        ``J&F-Mean`` (the mean of the next two), ``J-Mean``, ``J-Recall``, ``J-Decay``, ``F-Mean``,
        ``F-Recall``, ``F-Decay``, as fractions.

    Raises:
        ValueError: without objects.

    Example:
        >>> one = {"mean": 0.5, "recall": 1.0, "decay": 0.0}
        >>> summarize_objects([{"J": one, "F": {**one, "mean": 0.75}}])["J&F-Mean"]
        0.625
    """
    if not objects:
        raise ValueError("no objects to summarize")
    means = {
        f"{metric}-{statistic.capitalize()}": float(
            np.mean([scores[metric][statistic] for scores in objects])
        )
        for metric in ("J", "F")
        for statistic in ("mean", "recall", "decay")
    }
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}
