"""Whether a run trained or broke, and how: what the stability comparison counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dinovmf_plugin.training.alarms import CollapseWatch

__all__ = ["BROKEN", "TRAINS", "outcome_of"]

TRAINS = "trains"
BROKEN = {
    "diverged": "the loss or a weight became NaN or infinite",
    "uniform": "the outputs are uniform, the loss is pinned at log K",
    "one component": "one prototype is the target of nearly all images",
    "below untrained": "kNN is worse than with the untrained backbone",
}
"""How a run breaks, in the order in which it is looked for."""

_RECORDS = 3


def outcome_of(result: Mapping[str, Any], num_prototypes: int | None, k: int) -> str:
    """``trains``, or the first key of ``BROKEN`` that holds.

    Uniform outputs and a single component are read off the last three records of the monitor, by the
    criteria of ``analysis.alarms``.

    Args:
        result: with ``diverged``, ``monitor``, ``metrics`` and ``baselines``.
        num_prototypes: K; None for methods without prototypes.
        k: neighbours of the kNN comparison.

    Example:
        >>> result = {"diverged": None, "monitor": {"step": []}}
        >>> result |= {"metrics": {"knn_k10": 40.0}, "baselines": {"untrained": {"knn_k10": 55.0}}}
        >>> outcome_of(result, 64, 10)
        'below untrained'
    """
    if result["diverged"] is not None:
        return "diverged"
    records = result["monitor"]["step"][-_RECORDS:]
    if num_prototypes is not None and records:
        watch = CollapseWatch(num_prototypes, patience=len(records))
        alarms = [
            alarm.name for record in records for alarm in watch.update(_as_watched(record, watch))
        ]
        if "uniform_collapse" in alarms:
            return "uniform"
        if "one_component_collapse" in alarms:
            return "one component"
    trained = result["metrics"].get(f"knn_k{k}")
    floor = result["baselines"].get("untrained", {}).get(f"knn_k{k}")
    if trained is not None and floor is not None and trained < floor:
        return "below untrained"
    return TRAINS


def _as_watched(record: Mapping[str, Any], watch: CollapseWatch) -> dict[str, float]:
    """The record as the monitor's own watch sees it; what was not finite is NaN."""
    values = {key: math.nan if value is None else value for key, value in record.items()}
    return {**values, "loss": values.get("loss_over_log_k", math.nan) * watch.log_k}
