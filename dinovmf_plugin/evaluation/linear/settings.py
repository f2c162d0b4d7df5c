"""Keys of the linear probes; the defaults are DINO's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from dinovmf_plugin.evaluation.linear.scores import DEFAULT_LRS
from dinovmf_plugin.evaluation.settings import Section
from dinovmf_plugin.features.settings import Feature, Interpolation
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Fraction, Positive, Share, Weight
from dinovmf_plugin.runs.settings import Doc

__all__ = ["LinearSettings"]


@dataclass(frozen=True)
class LinearSettings(Section):
    """Linear probes (DINO), a grid of learning rates at once."""

    name: ClassVar[str] = "linear"
    features: Annotated[
        Sequence[Feature],
        AtLeastOne,
        Doc(
            "cls is [C], the last CLS; dino is [D], CLS of the last 4 blocks (S) or CLS and mean (B)"
        ),
    ] = ("cls", "dino")
    lrs: Annotated[
        Sequence[Positive],
        AtLeastOne,
        Doc("learning rates, times batch_size / 256; official: 0.001"),
    ] = DEFAULT_LRS
    epochs: Annotated[Count, Doc("passes over the training images")] = 100
    batch_size: Annotated[Count, Doc("of all processes together")] = 1024
    momentum: Annotated[Share, Doc("of SGD")] = 0.9
    weight_decay: Annotated[Weight, Doc("of the probes")] = 0.0
    augment: Annotated[
        bool, Doc("random crops and flips; false: features are extracted once and kept")
    ] = True
    min_scale: Annotated[Fraction, Doc("smallest crop, as a share of the area")] = 0.08
    train_interpolation: Interpolation = "bilinear"
    holdout: Annotated[
        Share,
        Doc("share of the training images that chooses epoch and rate, not the validation set"),
    ] = 0.0

    @property
    def wanted(self) -> Sequence[Feature]:
        """The features that the evaluation reads."""
        return self.features
