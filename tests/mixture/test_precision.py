"""Percentile groups against pandas' own cut, stable ties, and the trend against a hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dinovmf_plugin.mixture.precision import accuracy_by_percentile, precision_trend


def test_groups__equal_a_slow_reference():
    rng = np.random.default_rng(0)
    norms = rng.choice([0.5, 1.0, 1.5, 2.5, 4.0], size=103)
    correct = rng.random(103) < norms / 5
    # sort by (norm, image index), cut into 10 pieces, the first three one image larger
    ranking = sorted(range(103), key=lambda i: (norms[i], i))
    sizes = [11, 11, 11, 10, 10, 10, 10, 10, 10, 10]
    start = 0
    for size, group in zip(sizes, accuracy_by_percentile(norms, correct), strict=True):
        members = ranking[start : start + size]
        start += size
        assert group.images == size
        assert group.accuracy == pytest.approx(100 * np.mean(correct[members]))
        assert (group.norm_min, group.norm_max) == (norms[members[0]], norms[members[-1]])


def test_ties__keep_the_order_of_the_images():
    groups = accuracy_by_percentile([1.0] * 6, [1, 1, 1, 0, 0, 0], bins=2)
    assert [g.accuracy for g in groups] == [100.0, 0.0]


def test_trend__is_positive_negative_or_unknown():
    norms = [1.0, 2.0, 3.0, 4.0, 5.0]
    up = precision_trend(norms, [0, 0, 1, 1, 1])
    # ranks of the outcomes are 1.5, 1.5, 4, 4, 4
    ranks = np.array([1.5, 1.5, 4, 4, 4])
    assert up["spearman"] == pytest.approx(np.corrcoef(np.arange(5), ranks)[0, 1])
    assert precision_trend(norms, [1, 1, 0, 0, 0])["spearman"] == pytest.approx(-up["spearman"])
    assert math.isnan(precision_trend([1.0] * 5, [0, 0, 1, 1, 1])["spearman"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, 2.0], [1]), "one entry per image"),
        (([1.0, float("nan")], [1, 0]), "NaN"),
        (([1.0, 2.0], [1, 0], 3), "bins=3"),
        (([1.0, 2.0], [1, 0], 0), "bins=0"),
    ],
)
def test_bad_input__is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        accuracy_by_percentile(*arguments)
