"""Mean and spread over seeds, and what a difference may be called."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import ttest_ind

__all__ = ["describe_difference", "mean_and_std", "with_spread"]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of the sample (``ddof=1``); None for a single value.

    Raises:
        ValueError: without values.

    Example:
        >>> mean_and_std([70.0, 71.0, 72.0]), mean_and_std([70.0])
        ((71.0, 1.0), (70.0, None))
    """
    if not values:
        raise ValueError("there is no value to average")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), std


def with_spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± std`` as tables show it; a dash without values.

    Example:
        >>> with_spread([70.0, 71.0, 72.0]), with_spread([70.0]), with_spread([])
        ('71.0 ± 1.0', '70.0', '–')
    """
    if not values:
        return "–"
    mean, std = mean_and_std(values)
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def describe_difference(
    name: str, values: Sequence[float], other: str, other_values: Sequence[float]
) -> str:
    """One sentence on two groups of runs that says no more than the seeds allow.

    The yardstick is the standard deviation of the difference of two single runs,
    ``sqrt(std_a^2 + std_b^2)``: a difference of means no larger than that is *within the seed spread*. For
    a larger one, Welch's t-test is given, since few seeds prove little.

    Args:
        name: of the first group.
        values: accuracies in percent, one per seed.
        other: name of the second group.
        other_values: its accuracies.

    Raises:
        ValueError: if a group is empty.

    Example:
        >>> describe_difference("a", [71.0, 72.0], "b", [71.0, 71.5])
        'a and b do not differ beyond the seed spread: +0.25 points, spread 0.79 (2 and 2 seeds).'
    """
    (mean, std), (other_mean, other_std) = mean_and_std(values), mean_and_std(other_values)
    difference = mean - other_mean
    seeds = f"({len(values)} and {len(other_values)} seeds)"
    if std is None or other_std is None:
        return (
            f"{name} against {other}: {difference:+.2f} points {seeds}; with one seed the spread is "
            "unknown, so this shows nothing."
        )
    spread = math.hypot(std, other_std)
    if abs(difference) <= spread:
        return (
            f"{name} and {other} do not differ beyond the seed spread: {difference:+.2f} points, "
            f"spread {spread:.2f} {seeds}."
        )
    word = "above" if difference > 0 else "below"
    if spread == 0:
        return (
            f"{name} is {abs(difference):.2f} points {word} {other}; no spread over seeds {seeds}."
        )
    p = float(ttest_ind(values, other_values, equal_var=False).pvalue)
    verdict = "" if p < 0.05 else ", which these seeds do not establish"
    return (
        f"{name} is {abs(difference):.2f} points {word} {other}, more than the seed spread of "
        f"{spread:.2f} {seeds}; Welch's t-test p = {p:.2g}{verdict}."
    )
