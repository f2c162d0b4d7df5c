"""J and F against scikit-image morphology and plain loops; DAVIS's statistics by their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import morphology

from dinovmf_plugin.evaluation.video.scores import (
    contour_accuracy,
    mask_contour,
    mean_recall_decay,
    region_similarity,
    score_sequence,
    summarize_objects,
)


def loop_contour(mask):
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            edge[y, x] = any(
                mask[y, x] != mask[p] for p in ((y, right), (below, x), (below, right))
            )
    return edge


def dilated_f(mask, truth, tolerance=0.008):
    """F by dilating each contour with a disc."""
    disc = morphology.disk(math.ceil(tolerance * np.linalg.norm(mask.shape)))
    ours, theirs = loop_contour(mask), loop_contour(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    near_ours, near_theirs = (morphology.dilation(edge, disc) for edge in (ours, theirs))
    precision, recall = near_theirs[ours].mean(), near_ours[theirs].mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blobs(rng, shape):
    """A smooth random region; empty or full at the extremes."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(1, 6))
    return noise > np.quantile(noise, rng.choice([0, 0.3, 0.6, 0.9, 1]))


def test_contour_accuracy__equals_dilation_of_the_contours():
    rng = np.random.default_rng(0)
    empty = 0
    for _ in range(60):
        shape = tuple(rng.integers(12, 70, 2))
        truth = blobs(rng, shape)
        shift = tuple(rng.integers(-4, 5, 2))
        mask = np.roll(truth, shift, axis=(0, 1)) if rng.random() < 0.5 else blobs(rng, shape)
        tolerance = rng.choice([0.0, 0.008, 0.05])
        empty += not mask.any() or not truth.any()
        assert (mask_contour(mask) == loop_contour(mask)).all()
        expected = dilated_f(mask, truth, tolerance)
        assert contour_accuracy(mask, truth, tolerance=tolerance) == pytest.approx(expected)
    assert empty > 5


def test_contour_accuracy__at_the_size_of_davis():
    rng = np.random.default_rng(1)
    truth = ndimage.gaussian_filter(rng.normal(size=(480, 854)), 40) > 0.01
    mask = np.roll(truth, (9, 3), axis=(0, 1))
    disc = morphology.disk(8)
    ours, theirs = mask_contour(mask), mask_contour(truth)
    precision = morphology.dilation(theirs, disc)[ours].mean()
    recall = morphology.dilation(ours, disc)[theirs].mean()
    expected = 2 * precision * recall / (precision + recall)
    assert 0.1 < expected < 0.99
    assert contour_accuracy(mask, truth) == pytest.approx(expected, abs=1e-12)


def test_region_similarity__equals_an_independent_overlap():
    rng = np.random.default_rng(2)
    for _ in range(100):
        shape = tuple(rng.integers(3, 40, 2))
        mask, truth = blobs(rng, shape), blobs(rng, shape)
        pairs = {(int(a), int(b)) for a, b in np.argwhere(mask)}
        others = {(int(a), int(b)) for a, b in np.argwhere(truth)}
        expected = len(pairs & others) / len(pairs | others) if pairs | others else 1.0
        assert region_similarity(mask, truth) == pytest.approx(expected)


def test_empty_masks():
    nothing, something = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    something[5:9, 6:12] = True
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    for mask, truth in ((nothing, something), (something, nothing)):
        assert region_similarity(mask, truth) == contour_accuracy(mask, truth) == 0
    # a full mask has no contour either, since the image's edge is none
    assert contour_accuracy(~nothing, nothing) == 1
    assert region_similarity(~nothing, nothing) == 0


def test_masks__numbers_of_one_object_are_taken():
    truth = np.zeros((10, 10), np.uint8)
    truth[2:5, 2:5] = 7
    assert region_similarity(truth, truth > 0) == 1
    assert contour_accuracy((truth > 0).astype(int).tolist(), truth) == 1


@pytest.mark.parametrize("score", [region_similarity, contour_accuracy])
def test_bad_masks__one_sentence(score):
    mask = np.zeros((4, 5), bool)
    with pytest.raises(ValueError, match=r"mask is \(4, 5\), but truth is \(5, 4\)"):
        score(mask, mask.T)
    with pytest.raises(ValueError, match="truth holds several labels: pass one object at a time"):
        score(mask, np.arange(20).reshape(4, 5))
    with pytest.raises(ValueError, match=r"mask must be one frame \(height, width\)"):
        score(mask[None], mask)


def test_bad_tolerance():
    with pytest.raises(ValueError, match="tolerance=-1 must not be negative"):
        contour_accuracy(np.zeros((2, 2)), np.zeros((2, 2)), tolerance=-1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 67, 102, 300])
def test_mean_recall_decay__by_definition(length):
    values = np.random.default_rng(length).random(length)
    got = mean_recall_decay(values.tolist())
    # borders of the quarters, counted from 1 and shared: 1 + i (n - 1) / 4 with halves rounded up;
    # beyond 255 frames the official tool's 8-bit borders would wrap
    borders = [math.floor(1 + i * (length - 1) / 4 + 0.5) for i in range(5)]
    first, last = values[: borders[1]], values[borders[3] - 1 :]
    assert got["mean"] == pytest.approx(values.mean())
    assert got["recall"] == pytest.approx(sum(v > 0.5 for v in values) / length)
    assert got["decay"] == pytest.approx(first.mean() - last.mean())


def test_score_sequence__objects_of_the_first_frame_without_its_scores_and_the_lasts():
    rng = np.random.default_rng(3)
    truth = [rng.integers(0, 4, (20, 24)).astype(np.uint8) for _ in range(6)]
    truth[0][truth[0] == 2] = 0  # object 2 appears later: not followed
    truth[0][0, 0] = 255
    predicted = [rng.integers(0, 4, (20, 24)).astype(np.uint8) for _ in range(6)]
    scores = score_sequence(predicted, truth)
    assert list(scores) == [1, 3]
    for number, score in scores.items():
        regions = [
            region_similarity(predicted[t] == number, truth[t] == number) for t in range(1, 5)
        ]
        contours = [dilated_f(predicted[t] == number, truth[t] == number) for t in range(1, 5)]
        assert score["J"]["mean"] == pytest.approx(np.mean(regions))
        assert score["F"]["mean"] == pytest.approx(np.mean(contours))
    total = summarize_objects(list(scores.values()))
    assert total["J-Mean"] == pytest.approx((scores[1]["J"]["mean"] + scores[3]["J"]["mean"]) / 2)
    assert total["J&F-Mean"] == pytest.approx((total["J-Mean"] + total["F-Mean"]) / 2)
    assert total["F-Decay"] == pytest.approx(
        (scores[1]["F"]["decay"] + scores[3]["F"]["decay"]) / 2
    )


def test_score_sequence__first_and_last_frame_do_not_matter():
    rng = np.random.default_rng(4)
    truth = [rng.integers(0, 2, (16, 16)).astype(np.uint8) for _ in range(5)]
    wrong = [np.zeros((16, 16), np.uint8), *truth[1:-1], np.zeros((16, 16), np.uint8)]
    assert score_sequence(wrong, truth)[1]["J"] == {"mean": 1.0, "recall": 1.0, "decay": 0.0}


def test_bad_sequences__one_sentence():
    frame = np.ones((4, 4), np.uint8)
    with pytest.raises(ValueError, match="3 predicted frames, but 4 annotated"):
        score_sequence([frame] * 3, [frame] * 4)
    with pytest.raises(ValueError, match="2 frames cannot be scored"):
        score_sequence([frame] * 2, [frame] * 2)
    with pytest.raises(ValueError, match="shows no object"):
        score_sequence([frame] * 3, [frame * 0] * 3)
    with pytest.raises(ValueError, match="no frames were scored"):
        mean_recall_decay([])
    with pytest.raises(ValueError, match="no objects"):
        summarize_objects([])
