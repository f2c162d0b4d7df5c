"""The channel statistics that a network was trained with: its images must be normalized by no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dinovmf_plugin.data.recipe import DATASET_STATISTICS, IMAGENET_MEAN, IMAGENET_STD

__all__ = ["IMAGENET", "Statistics", "channel_statistics"]

Triple = tuple[float, float, float]


class Statistics(NamedTuple):
    """Mean and standard deviation per channel, of values in [0, 1]."""

    mean: Triple
    std: Triple


IMAGENET = Statistics(IMAGENET_MEAN, IMAGENET_STD)


def _triple(key: str, value: Any, default: Triple) -> Triple:
    if value is None:
        return default
    try:
        first, second, third = (float(part) for part in value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{key}={value!r} of the stored config must be three numbers, one per channel"
        ) from None
    return first, second, third


def channel_statistics(config: Mapping[str, Any]) -> Statistics:
    """Statistics that a config stored with weights tells, read as training reads it.

    Those of timm's ``pretrained_cfg``; else the data set's, where it has its own; else those of the
    first augmentation pipeline.

    Args:
        config: ``StoredWeights.config``; whatever it does not tell is ImageNet's.

    Raises:
        ValueError: if they are not three numbers each, the deviations positive.

    Example:
        >>> channel_statistics({"data": {"dataset": "cifar10"}}).mean
        (0.4914, 0.4822, 0.4465)
        >>> channel_statistics({}) == IMAGENET
        True
    """
    told = config.get("pretrained_cfg")
    if not isinstance(told, Mapping):
        data = config.get("data")
        dataset = data.get("dataset") if isinstance(data, Mapping) else config.get("dataset")
        if str(dataset) in DATASET_STATISTICS:
            return Statistics(*DATASET_STATISTICS[str(dataset)])
        pipelines = config.get("augmentations")
        told = pipelines[0] if isinstance(pipelines, list | tuple) and pipelines else {}
    if not isinstance(told, Mapping):
        return IMAGENET
    mean = _triple("mean", told.get("mean"), IMAGENET_MEAN)
    std = _triple("std", told.get("std"), IMAGENET_STD)
    if min(std) <= 0:
        raise ValueError(f"std={list(std)} of the stored config must be positive")
    return Statistics(mean, std)
