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
    "uniform": "the targets say next to nothing about the image, or the loss is pinned at log K",
    "one component": "one prototype is the target of nearly all images",
    "information lost": "the targets say less than a quarter of what they once did",
    "below untrained": "kNN is worse than with the untrained backbone",
}
"""How a run breaks, in the order in which it is looked for."""

_RECORDS = 3
_ALARMS = {
    "uniform_collapse": "uniform",
    "one_component_collapse": "one component",
    "information_lost": "information lost",
}


def outcome_of(result: Mapping[str, Any], num_prototypes: int | None, k: int) -> str:
    """``trains``, or the first key of ``BROKEN`` that holds.

    What collapsed is read off the last three records of the monitor, by the criteria of
    ``training.alarms``; a run that recovered trains.

    Args:
        result: with ``diverged``, ``monitor``, ``metrics`` and ``baselines``.
        num_prototypes: K; None for methods without prototypes.
        k: neighbors of the kNN comparison.

    Example:
        >>> result = {"diverged": None, "monitor": {"step": []}}
        >>> result |= {"metrics": {"knn_k10": 40.0}, "baselines": {"untrained": {"knn_k10": 55.0}}}
        >>> outcome_of(result, 64, 10)
        'below untrained'
    """
    if result["diverged"] is not None:
        return "diverged"
    records = result["monitor"]["step"]
    if num_prototypes is not None and records:
        watch = CollapseWatch(num_prototypes, patience=min(_RECORDS, len(records)))
        for record in records:
            # what was not finite is null in the file
            watch.update({k: math.nan if v is None else v for k, v in record.items()})
        for name, outcome in _ALARMS.items():
            if watch.streaks[name] >= watch.patience:
                return outcome
    trained = result["metrics"].get(f"knn_k{k}")
    floor = result["baselines"].get("untrained", {}).get(f"knn_k{k}")
    if trained is not None and floor is not None and trained < floor:
        return "below untrained"
    return TRAINS
