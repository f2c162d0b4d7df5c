"""Mean and spread over seeds, and what a difference may be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import ttest_1samp

__all__ = ["describe_difference", "mean_and_std", "paired_differences", "paired_p", "with_spread"]


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


def paired_differences(by_seed: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``by_seed - other`` for every seed that both have.

    Example:
        >>> paired_differences({0: 3.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 1.0})
        [2.0, 3.0]
    """
    return [by_seed[seed] - other[seed] for seed in by_seed if seed in other]


def paired_p(differences: Sequence[float]) -> float | None:
    """P-value of a paired t-test; None where there is nothing to test.

    That is with fewer than three differences (one degree of freedom: two equal ones would have p = 0), and
    with differences that are equal but for rounding.

    Example:
        >>> round(paired_p([1.0, 1.0, 1.1]), 4), paired_p([1.0, 1.1]), paired_p([1.0, 1.0, 1.0])
        (0.001, None, None)
    """
    if len(differences) < 3 or max(differences) - min(differences) < 1e-9:
        return None
    return float(ttest_1samp(differences, 0.0).pvalue)


def describe_difference(
    name: str, by_seed: Mapping[int, float], other: str, other_by_seed: Mapping[int, float]
) -> str:
    """One sentence on two groups of runs that says no more than the seeds allow.

    A paired t-test over the seeds that both have: one seed gives both the same initialization of the
    backbone, order of images and crops, so that what varies is the difference. Not corrected for the
    number of comparisons. Fewer than three seeds are not tested.

    Args:
        name: of the first group.
        by_seed: accuracies in percent by seed.
        other: name of the second group.
        other_by_seed: its accuracies.

    Raises:
        ValueError: if a group is empty.

    Example:
        >>> print(describe_difference("a", {0: 71.0, 1: 72.0, 2: 73.1}, "b", {0: 70.0, 1: 71.0, 2: 72.0}))
        a is above b: +1.03 ± 0.06 points over 3 paired seeds, p = 0.001.
    """
    if not by_seed or not other_by_seed:
        raise ValueError("there is no value to compare")
    differences = paired_differences(by_seed, other_by_seed)
    count = len(differences)
    if count < 2:
        told = f"{differences[0]:+.2f} points; " if differences else ""
        return (
            f"{name} against {other}: {told}with {count} seed(s) in common the spread is unknown, so this "
            "shows nothing."
        )
    mean, _ = mean_and_std(differences)
    seeds = f"{with_spread(differences, 2)} points over {count} paired seeds"
    sign = "+" if mean >= 0 else ""
    if count < 3:
        return f"{name} against {other}: {sign}{seeds}, too few for a test."
    p = paired_p(differences)
    if p is None:
        word = "above" if mean > 0 else "below" if mean < 0 else "level with"
        return f"{name} is {word} {other}: {mean:+.2f} points with each of {count} paired seeds."
    if p >= 0.05:
        return f"{name} and {other} do not differ beyond the spread of the seeds: {sign}{seeds}, p = {p:.2g}."
    word = "above" if mean > 0 else "below"
    return f"{name} is {word} {other}: {sign}{seeds}, p = {p:.2g}."
