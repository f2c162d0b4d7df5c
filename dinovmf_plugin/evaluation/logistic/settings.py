"""Keys of the logistic regressions; the defaults are MSN's and Ericsson et al.'s protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le

from dinovmf_plugin.evaluation.logistic.few_shot import DEFAULT_LAMBD
from dinovmf_plugin.evaluation.settings import OneFeature
from dinovmf_plugin.features.settings import Feature, Interpolation
from dinovmf_plugin.runs.bounds import Count, Fraction, Path, Positive
from dinovmf_plugin.runs.settings import Doc

__all__ = ["FewShotSettings", "TransferSettings"]

Exponent = Annotated[float, Ge(-100), Le(100)]
Tolerance = Annotated[
    Positive, Doc("of the solver: largest entry of the gradient of the mean loss")
]


@dataclass(frozen=True)
class FewShotSettings(OneFeature):
    """Few-shot logistic regression (MSN)."""

    name: ClassVar[str] = "few_shot"
    interpolation: Interpolation = "bilinear"
    feature: Annotated[Feature, Doc("CLS before the final norm, as MSN; see knn.feature")] = (
        "cls_pre_norm"
    )
    counts: Annotated[
        Sequence[Count],
        Doc("images per class; more than the smallest class has are skipped and recorded"),
    ] = (1, 2, 5)
    fraction: Annotated[
        Fraction | None,
        Doc(
            "share of all images, one split; null: none; with split_dir 0.01 (1percent.txt) or null"
        ),
    ] = 0.01
    num_splits: Annotated[Count, Doc("per count: drawn, or lists of split_dir")] = 3
    split_dir: Annotated[
        Path | None, Doc("folder of MSN's imagenet_subsets1, 2, 3; null: draw by seed")
    ] = None
    lambd: Annotated[
        Positive, Doc("the l2 strength of the mean loss is lambd / N (scikit-learn: C = 1 / lambd)")
    ] = DEFAULT_LAMBD
    preprocess: Annotated[bool, Doc("subtract each feature's own mean, then l2-normalize")] = True
    tol: Tolerance = 1e-6
    max_iter: Annotated[Count, Doc("of the solver")] = 1000

    def check(self) -> None:
        """Refuse settings that leave nothing to do (``ValueError``)."""
        super().check()
        if not self.counts and self.fraction is None:
            raise ValueError("counts=[] and fraction=null leave nothing to do")


@dataclass(frozen=True)
class TransferSettings(OneFeature):
    """Logistic regression on small data sets (Ericsson et al., cross-validated)."""

    name: ClassVar[str] = "transfer"
    resize: Annotated[Count, Doc("shorter side of the resized image in pixels")] = 224
    root: Annotated[
        Path | None,
        Doc(
            "folder of the data sets, laid out as torchvision does; null: data.train_path / val_path"
        ),
    ] = None
    datasets: Annotated[
        Sequence[str] | None,
        Doc("null: the nine of Table 5; or a list of those and of folders root/NAME/{train,test}"),
    ] = None
    log10_min: Annotated[Exponent, Doc("smallest l2 strength, as a power of ten")] = -6.0
    log10_max: Annotated[Exponent, Doc("largest l2 strength, as a power of ten")] = 5.0
    num_values: Annotated[Count, Doc("strengths, evenly spaced as powers")] = 45
    folds: Annotated[int, Ge(2), Doc("stratified, of the cross-validation")] = 5
    select: Annotated[
        Literal["top1", "mean_per_class"], Doc("the cross-validated score that chooses")
    ] = "top1"
    tol: Tolerance = 1e-5
    max_iter: Annotated[Count, Doc("per fit; fits start from the next stronger one's solution")] = (
        100
    )
    n_jobs: Annotated[
        Count | None, Doc("folds at once, in threads that share the cores; null: one per core")
    ] = None

    @property
    def weight_decays(self) -> list[float]:
        """The grid of strengths."""
        values = np.logspace(self.log10_min, self.log10_max, self.num_values)
        return [float(value) for value in values]

    def check(self) -> None:
        """Refuse a grid without values, and data sets without their folder (``ValueError``)."""
        super().check()
        if self.log10_min > self.log10_max:
            raise ValueError(
                f"log10_min={self.log10_min} must be at most log10_max={self.log10_max}"
            )
        if self.datasets is not None and self.root is None:
            raise ValueError(
                f"datasets={list(self.datasets)} needs transfer.root, the folder that holds them"
            )
