"""Every knob of the evaluations; the defaults are the protocols. configs/ explains each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.evaluation.linear.scores import DEFAULT_LRS
from dinovmf_plugin.evaluation.logistic.few_shot import DEFAULT_LAMBD
from dinovmf_plugin.features.images import FORMATS
from dinovmf_plugin.features.knn import DEFAULT_KS, DEFAULT_TEMPERATURE
from dinovmf_plugin.runs.settings import build, check_type

__all__ = [
    "BASELINES",
    "EVALUATIONS",
    "DataSettings",
    "EvaluationSettings",
    "FewShotSettings",
    "KnnSettings",
    "LinearSettings",
    "TransferSettings",
]

BASELINES = ("untrained", "pixels")
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Feature = str | Mapping[str, Any]


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value!r} must be one of {list(allowed)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{key}={value} must be at least {least}")


@dataclass(frozen=True)
class _Section:
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
class _OneFeature(_Section):
    feature: Feature = "cls"

    @property
    def wanted(self) -> Sequence[Feature]:
        """See ``_Section.wanted``."""
        return (self.feature,)


@dataclass(frozen=True)
class KnnSettings(_OneFeature):
    """Weighted kNN (DINO)."""

    name: ClassVar[str] = "knn"
    ks: Sequence[int] = DEFAULT_KS
    temperature: float = DEFAULT_TEMPERATURE
    chunk: int = 4096
    query_chunk: int = 1024

    def check(self) -> None:
        """See ``_Section.check``."""
        super().check()
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"knn.ks={list(self.ks)} must name numbers of neighbours from 1 on")
        if self.temperature <= 0:
            raise ValueError(f"knn.temperature={self.temperature} must be positive")
        _at_least("knn.chunk", self.chunk, 1)
        _at_least("knn.query_chunk", self.query_chunk, 1)


@dataclass(frozen=True)
class LinearSettings(_Section):
    """Linear probes (DINO), a grid of learning rates at once."""

    name: ClassVar[str] = "linear"
    features: Sequence[Feature] = ("cls", "dino")
    lrs: Sequence[float] = DEFAULT_LRS
    epochs: int = 100
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: bool = True
    min_scale: float = 0.08
    train_interpolation: str = "bilinear"
    holdout: float = 0.0

    @property
    def wanted(self) -> Sequence[Feature]:
        """See ``_Section.wanted``."""
        return self.features

    def check(self) -> None:
        """See ``_Section.check``."""
        super().check()
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"linear.lrs={list(self.lrs)} must be positive learning rates")
        if not self.features:
            raise ValueError("linear.features=[] must name at least one feature")
        _at_least("linear.epochs", self.epochs, 1)
        _at_least("linear.batch_size", self.batch_size, 1)
        _one_of("linear.train_interpolation", self.train_interpolation, ("bilinear", "bicubic"))
        if not 0 <= self.holdout < 1:
            raise ValueError(f"linear.holdout={self.holdout} must be at least 0 and below 1")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"linear.min_scale={self.min_scale} must be above 0 and at most 1")


@dataclass(frozen=True)
class FewShotSettings(_OneFeature):
    """Few-shot logistic regression (MSN)."""

    name: ClassVar[str] = "few_shot"
    interpolation: str = "bilinear"
    feature: Feature = "cls_pre_norm"
    counts: Sequence[int] = (1, 2, 5)
    fraction: float | None = 0.01
    num_splits: int = 3
    split_dir: str | None = None
    lambd: float = DEFAULT_LAMBD
    preprocess: bool = True
    tol: float = 1e-6
    max_iter: int = 1000

    def check(self) -> None:
        """See ``_Section.check``."""
        super().check()
        if not self.counts and self.fraction is None:
            raise ValueError("few_shot.counts=[] and few_shot.fraction=null leave nothing to do")
        if self.counts and min(self.counts) < 1:
            raise ValueError(
                f"few_shot.counts={list(self.counts)} must be numbers of images from 1 on"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"few_shot.fraction={self.fraction} must be above 0 and at most 1")
        _at_least("few_shot.num_splits", self.num_splits, 1)
        if self.lambd <= 0:
            raise ValueError(f"few_shot.lambd={self.lambd} must be positive")


@dataclass(frozen=True)
class TransferSettings(_OneFeature):
    """Logistic regression on small data sets (Ericsson et al., cross-validated)."""

    name: ClassVar[str] = "transfer"
    resize: int = 224
    root: str | None = None
    datasets: Sequence[str] | None = None
    log10_min: float = -6.0
    log10_max: float = 5.0
    num_values: int = 45
    folds: int = 5
    select: str = "top1"
    tol: float = 1e-5
    max_iter: int = 100
    n_jobs: int | None = None

    @property
    def weight_decays(self) -> list[float]:
        """The grid of strengths."""
        values = np.logspace(self.log10_min, self.log10_max, self.num_values)
        return [float(value) for value in values]

    def check(self) -> None:
        """See ``_Section.check``."""
        super().check()
        _one_of("transfer.select", self.select, ("top1", "mean_per_class"))
        _at_least("transfer.folds", self.folds, 2)
        _at_least("transfer.num_values", self.num_values, 1)
        _at_least("transfer.max_iter", self.max_iter, 1)
        if self.n_jobs is not None:
            _at_least("transfer.n_jobs", self.n_jobs, 1)
        if self.datasets is not None and self.root is None:
            raise ValueError(
                f"transfer.datasets={list(self.datasets)} needs transfer.root, the folder that holds them"
            )


EVALUATIONS: dict[str, type[_Section]] = {
    section.name: section
    for section in (KnnSettings, LinearSettings, FewShotSettings, TransferSettings)
}


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
    sections: Mapping[str, _Section]
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

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], evaluations: Sequence[str] | None = None
    ) -> EvaluationSettings:
        """From a resolved hydra config: common keys, ``data``, and one section per evaluation.

        Args:
            config: plain containers.
            evaluations: by default ``config["evaluations"]``.

        Raises:
            ValueError: for an unknown evaluation or key, or a value of the wrong type or that cannot work.
        """
        config = dict(config)
        given = config.pop("evaluations", ()) if evaluations is None else evaluations
        check_type("evaluations", given, Sequence[str])
        chosen = list(given)
        unknown = [name for name in chosen if name not in EVALUATIONS]
        if unknown or not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"evaluations={chosen} must be some of {list(EVALUATIONS)}, each once")
        sections = {
            name: build(EVALUATIONS[name], config.pop(name, {}) or {}, f"{name}.")
            for name in EVALUATIONS
        }
        data = build(DataSettings, config.pop("data", {}) or {}, "data.")
        rest = {"evaluations": chosen, "sections": sections, "data": data}
        settings: EvaluationSettings = build(cls, config | rest, "")
        settings.check()
        return settings

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
            _one_of("baselines", baseline, BASELINES)
        _one_of("which", self.which, ("teacher", "student"))
        _one_of("precision", self.precision, list(PRECISIONS))
        _one_of("cache_dtype", self.cache_dtype, ("float32", "float16"))
        _one_of("data.format", self.data.format, FORMATS)
        _at_least("data.batch_size", self.data.batch_size, 1)
        _at_least("data.num_workers", self.data.num_workers, 0)
