"""Knobs of the logistic regressions; the defaults are MSN's and Ericsson et al.'s protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dinovmf_plugin.evaluation.logistic.few_shot import DEFAULT_LAMBD
from dinovmf_plugin.evaluation.settings import Feature, OneFeature, at_least, one_of

__all__ = ["FewShotSettings", "TransferSettings"]


@dataclass(frozen=True)
class FewShotSettings(OneFeature):
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
        """Refuse what cannot work (``ValueError`` naming the key)."""
        super().check()
        if not self.counts and self.fraction is None:
            raise ValueError("few_shot.counts=[] and few_shot.fraction=null leave nothing to do")
        if self.counts and min(self.counts) < 1:
            raise ValueError(
                f"few_shot.counts={list(self.counts)} must be numbers of images from 1 on"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"few_shot.fraction={self.fraction} must be above 0 and at most 1")
        at_least("few_shot.num_splits", self.num_splits, 1)
        if self.lambd <= 0:
            raise ValueError(f"few_shot.lambd={self.lambd} must be positive")


@dataclass(frozen=True)
class TransferSettings(OneFeature):
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
        """Refuse what cannot work (``ValueError`` naming the key)."""
        super().check()
        one_of("transfer.select", self.select, ("top1", "mean_per_class"))
        at_least("transfer.folds", self.folds, 2)
        at_least("transfer.num_values", self.num_values, 1)
        at_least("transfer.max_iter", self.max_iter, 1)
        if self.n_jobs is not None:
            at_least("transfer.n_jobs", self.n_jobs, 1)
        if self.datasets is not None and self.root is None:
            raise ValueError(
                f"transfer.datasets={list(self.datasets)} needs transfer.root, the folder that holds them"
            )
