"""Schedules as pure functions of the step: nothing to save, so resuming is exact.

``step`` counts optimizer steps from 0, ``total`` is their number in the whole run.
"""

from __future__ import annotations

import math

__all__ = ["cosine", "learning_rate", "linear", "teacher_temperature"]


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 towards ``end``, reached at ``step == total``.

    The official DINO tables hold ``total`` values and so never contain the end either: weight decay
    0.04 -> 0.4 and the EMA momentum 0.996 -> 1 use it as it is.

    Example:
        >>> [round(cosine(s, 4, 0.0, 1.0), 4) for s in range(5)]
        [0.0, 0.1464, 0.5, 0.8536, 1.0]
    """
    _check(total)
    progress = min(max(step, 0), total) / total
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, total: float, start: float, end: float) -> float:
    """Straight line from ``start`` to ``end`` at ``step == total``, constant afterwards.

    Example:
        >>> linear(5, 10, 0.996, 1.0)
        0.998
    """
    return start + (end - start) * min(max(step, 0) / total, 1.0) if total > 0 else end


def learning_rate(
    step: int, total: int, peak: float, end: float, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """Linear warm-up from ``start``, then a cosine to ``end`` (DINO ``main_dino.py``).

    The warm-up covers ``warmup_steps`` values from ``start`` to ``peak`` inclusive, as the official
    table does; the cosine runs over the remaining ``total - warmup_steps`` steps.

    Raises:
        ValueError: if the warm-up is longer than the run.

    Example:
        >>> [round(learning_rate(s, 8, 1.0, 0.0, warmup_steps=3), 3) for s in range(8)]
        [0.0, 0.5, 1.0, 1.0, 0.905, 0.655, 0.345, 0.095]
    """
    _check(total)
    if warmup_steps > total:
        raise ValueError(f"warmup_steps={warmup_steps} is longer than the run of {total} steps")
    if step < warmup_steps:
        return linear(step, warmup_steps - 1, start, peak) if warmup_steps > 1 else start
    return cosine(step - warmup_steps, max(total - warmup_steps, 1), peak, end)


def teacher_temperature(epoch: int, warmup: float, final: float, warmup_epochs: int) -> float:
    """Teacher temperature of an epoch: ``warmup`` -> ``final`` over ``warmup_epochs`` (DINO).

    Linear with both ends included: epoch ``warmup_epochs - 1`` already has the final value.

    Example:
        >>> [round(teacher_temperature(e, 0.04, 0.07, 4), 3) for e in range(6)]
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    """
    if epoch >= warmup_epochs:
        return final
    if warmup_epochs == 1:
        return warmup
    return warmup + (final - warmup) * max(epoch, 0) / (warmup_epochs - 1)


def _check(total: int) -> None:
    if total < 1:
        raise ValueError(f"total={total} steps: a schedule needs at least one step")
