"""Schedules against tables built as the official code builds them: numpy, one value per iteration."""

from __future__ import annotations

import numpy as np
import pytest

from dinovmf_plugin.core import schedules


def table(peak, end, epochs, steps, warmup_epochs=0, start=0.0) -> np.ndarray:
    """Linear warm-up by ``linspace``, then half a cosine over the remaining iterations."""
    warmup = np.linspace(start, peak, warmup_epochs * steps)
    rest = np.arange(epochs * steps - len(warmup))
    cosine = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * rest / len(rest)))
    return np.concatenate([warmup, cosine])


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.996, 1.0), (1.0, 0.0), (0.3, 0.3)])
def test_cosine__equals_table(start, end):
    ours = [schedules.cosine(step, 60, start, end) for step in range(60)]
    np.testing.assert_allclose(ours, table(start, end, 6, 10), rtol=1e-12)
    assert schedules.cosine(60, 60, start, end) == end
    assert schedules.cosine(61, 60, start, end) == end
    assert schedules.cosine(-1, 60, start, end) == schedules.cosine(0, 60, start, end)


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(8, 5, 2), (8, 5, 0), (3, 1, 1), (4, 7, 3)]
)
@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_learning_rate__equals_table(epochs, steps, warmup, start):
    total = epochs * steps
    ours = [
        schedules.learning_rate(step, total, 2e-3, 1e-5, warmup * steps, start)
        for step in range(total)
    ]
    np.testing.assert_allclose(ours, table(2e-3, 1e-5, epochs, steps, warmup, start), rtol=1e-12)


def test_learning_rate__warmup_is_the_whole_run():
    ours = [schedules.learning_rate(step, 4, 1.0, 0.0, warmup_steps=4) for step in range(4)]
    np.testing.assert_allclose(ours, np.linspace(0, 1, 4))


def test_learning_rate__warmup_longer_than_the_run__named():
    with pytest.raises(ValueError, match="warmup_steps=11 is longer than the run of 10 steps"):
        schedules.learning_rate(0, 10, 1.0, 0.0, warmup_steps=11)


@pytest.mark.parametrize("function", [schedules.cosine, schedules.learning_rate])
def test_no_steps__named(function):
    with pytest.raises(ValueError, match="total=0 steps"):
        function(0, 0, 1.0, 0.0)


def test_linear__reaches_its_end_and_stays():
    ours = [schedules.linear(step, 8, 0.996, 1.0) for step in range(8)]
    np.testing.assert_allclose(ours, np.linspace(0.996, 1.0, 9)[:8])
    assert schedules.linear(8, 8, 0.996, 1.0) == 1.0
    assert schedules.linear(20, 8, 0.996, 1.0) == 1.0
    # MSN stretches its horizon by a quarter: 0.9992 at the end of the run
    assert schedules.linear(8, 1.25 * 8, 0.996, 1.0) == pytest.approx(0.9992)
    assert schedules.linear(0, 0, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
@pytest.mark.parametrize(("first", "final"), [(0.04, 0.07), (0.04, 0.04)])
def test_teacher_temperature__equals_table(warmup, first, final):
    expected = np.concatenate([np.linspace(first, final, warmup), np.full(40 - warmup, final)])
    ours = [schedules.teacher_temperature(epoch, first, final, warmup) for epoch in range(40)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    # no table to run off the end of
    assert schedules.teacher_temperature(10_000, first, final, warmup) == final
