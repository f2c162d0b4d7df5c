"""Knobs of fine-tuning; the defaults are the BEiT-style recipe of ViT-S, configs/ holds the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dinovmf_plugin.evaluation.settings import Section, at_least, one_of

__all__ = ["FinetuneSettings"]


@dataclass(frozen=True)
class FinetuneSettings(Section):
    """Training the whole network with labels (protocol sources: BEiT as iBOT uses it, and DeiT).

    The random augmentation is timm's: random resized crops, flips, RandAugment, random erasing, then
    mixup and cutmix per batch. timm ignores colour jitter where RandAugment is on, so it is no key.
    """

    name: ClassVar[str] = "finetune"
    dataset: str | None = None
    root: str | None = None
    epochs: int = 200
    batch_size: int = 1024
    lr: Sequence[float] | float = (8e-4, 9e-4, 1e-3, 2e-3)
    lr_reference_batch: int | None = None
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_epochs: int = 20
    warmup_prefix: bool = True
    step_on_epochs: bool = False
    weight_decay: float = 0.05
    layer_decay: float | None = 0.75
    drop_path: float = 0.1
    clip_grad: float | None = None
    init_scale: float = 0.001
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    train_interpolation: str = "bicubic"
    erasing: float = 0.25
    repeated_aug: int = 0
    ema_decay: float | None = None
    resume: bool = True

    @property
    def lrs(self) -> list[float]:
        """The learning rates to try."""
        return [self.lr] if isinstance(self.lr, int | float) else [float(lr) for lr in self.lr]

    def scaled(self, lr: float) -> float:
        """``lr`` times ``batch_size / lr_reference_batch``, where that is set."""
        if self.lr_reference_batch is None:
            return lr
        return lr * self.batch_size / self.lr_reference_batch

    def check(self) -> None:
        """Refuse what cannot work (``ValueError`` naming the key)."""
        super().check()
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"finetune.lr={self.lr} must be one or more positive learning rates")
        at_least("finetune.epochs", self.epochs, 1)
        at_least("finetune.batch_size", self.batch_size, 1)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"finetune.warmup_epochs={self.warmup_epochs} must be at least 0 and below "
                f"epochs={self.epochs}"
            )
        for key in ("mixup", "cutmix", "min_lr", "warmup_lr", "weight_decay", "init_scale"):
            at_least(f"finetune.{key}", getattr(self, key), 0)
        for key in ("smoothing", "erasing", "drop_path"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(
                    f"finetune.{key}={getattr(self, key)} must be at least 0 and below 1"
                )
        for key in ("layer_decay", "ema_decay"):
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"finetune.{key}={value} must be between 0 and 1, or null")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"finetune.clip_grad={self.clip_grad} must be positive, or null")
        one_of("finetune.train_interpolation", self.train_interpolation, ("bicubic", "bilinear"))
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"finetune.batch_size={self.batch_size} must be even for mixup and cutmix"
            )
        if (self.dataset is None) != (self.root is None):
            raise ValueError(
                f"finetune.dataset={self.dataset!r} and finetune.root={self.root!r} go together: the name "
                "of a data set and the folder that holds it"
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def binding(self) -> dict[str, Any]:
        """What a stopped training must agree on to go on."""
        free = ("lr", "resume", "root")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
