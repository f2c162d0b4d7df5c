"""What all evaluations can be told: the network, the data, and a section per evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.images import FORMATS

__all__ = [
    "BASELINES",
    "PRECISIONS",
    "DataSettings",
    "EvaluationSettings",
    "Feature",
    "OneFeature",
    "Section",
    "at_least",
    "one_of",
]

BASELINES = ("untrained", "pixels")
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Feature = str | Mapping[str, Any]


def one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError that names the key unless ``value`` is allowed."""
    if value not in allowed:
        raise ValueError(f"{key}={value!r} must be one of {list(allowed)}")


def at_least(key: str, value: float, least: float) -> None:
    """Raise a ValueError that names the key unless ``value`` is large enough."""
    if value < least:
        raise ValueError(f"{key}={value} must be at least {least}")


@dataclass(frozen=True)
class Section:
    """Settings of one evaluation; all have a deterministic test transform."""

    name: ClassVar[str]
    resize: int = 256
    crop_size: int = 224
    interpolation: str = "bicubic"

    @property
    def wanted(self) -> Sequence[Feature]:
        """The features that the evaluation reads."""
        return ()

    @property
    def transform(self) -> CenterCrop:
        """The test transform, without the network's own channel statistics."""
        try:
            return CenterCrop(self.resize, self.crop_size, self.interpolation)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ValueError: naming the key.
        """
        _ = self.transform


@dataclass(frozen=True)
class OneFeature(Section):
    """Settings of an evaluation that reads one feature."""

    feature: Feature = "cls"

    @property
    def wanted(self) -> Sequence[Feature]:
        """The features that the evaluation reads."""
        return (self.feature,)


@dataclass(frozen=True)
class DataSettings:
    """Image folders, and how they are read."""

    train_path: str | None = None
    val_path: str | None = None
    format: Literal["image_folder", "dali"] = "image_folder"
    batch_size: int = 64
    num_workers: int = 4
    check_images: str = "fast"
    skip_unreadable: bool = False


@dataclass(frozen=True)
class EvaluationSettings:
    """A whole run: one network, the data, and the chosen evaluations."""

    checkpoint: str | None
    output_dir: str | None
    evaluations: Sequence[str]
    sections: Mapping[str, Section]
    data: DataSettings = field(default_factory=DataSettings)
    which: Literal["teacher", "student"] = "teacher"
    model_name: str | None = None
    num_heads: int | None = None
    baselines: Sequence[str] = ()
    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    cache_dir: str | None = None
    cache_dtype: str = "float32"
    progress: bool = True

    def check(self) -> None:
        """Refuses what cannot work, before anything is read.

        Raises:
            ValueError: naming the key, its value and what would be right.
        """
        for key in ("checkpoint", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)!r} must be set")
        for name in self.evaluations:
            self.sections[name].check()
        for baseline in self.baselines:
            one_of("baselines", baseline, BASELINES)
        one_of("which", self.which, ("teacher", "student"))
        one_of("precision", self.precision, list(PRECISIONS))
        one_of("cache_dtype", self.cache_dtype, ("float32", "float16"))
        one_of("data.format", self.data.format, FORMATS)
        at_least("data.batch_size", self.data.batch_size, 1)
        at_least("data.num_workers", self.data.num_workers, 0)
