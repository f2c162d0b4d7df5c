"""Knobs of the linear probes; the defaults are DINO's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dinovmf_plugin.evaluation.linear.scores import DEFAULT_LRS
from dinovmf_plugin.evaluation.settings import Feature, Section, at_least, one_of

__all__ = ["LinearSettings"]


@dataclass(frozen=True)
class LinearSettings(Section):
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
        """The features that the evaluation reads."""
        return self.features

    def check(self) -> None:
        """Refuse what cannot work (``ValueError`` naming the key)."""
        super().check()
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"linear.lrs={list(self.lrs)} must be positive learning rates")
        if not self.features:
            raise ValueError("linear.features=[] must name at least one feature")
        at_least("linear.epochs", self.epochs, 1)
        at_least("linear.batch_size", self.batch_size, 1)
        one_of("linear.train_interpolation", self.train_interpolation, ("bilinear", "bicubic"))
        if not 0 <= self.holdout < 1:
            raise ValueError(f"linear.holdout={self.holdout} must be at least 0 and below 1")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"linear.min_scale={self.min_scale} must be above 0 and at most 1")
