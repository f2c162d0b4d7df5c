"""Keys of fine-tuning; the defaults are the BEiT-style recipe of ViT-S, configs/ holds the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from annotated_types import Gt, Lt

from dinovmf_plugin.evaluation.settings import CommonSettings, Section
from dinovmf_plugin.features.settings import Interpolation
from dinovmf_plugin.runs.bounds import (
    AtLeastOne,
    Count,
    Path,
    Positive,
    Share,
    Weight,
    Whole,
)
from dinovmf_plugin.runs.settings import Doc

__all__ = ["FinetuneRun", "FinetuneSettings"]

Decay = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class FinetuneSettings(Section):
    """Training the whole network with labels (protocol sources: BEiT as iBOT uses it, and DeiT).

    The random augmentation is timm's: random resized crops, flips, RandAugment, random erasing, then
    mixup and cutmix per batch. timm ignores color jitter where RandAugment is on, so it is no key.
    """

    name: ClassVar[str] = "finetune"
    dataset: Annotated[
        str | None,
        Doc("null: data.train_path / val_path; or a set of Table 5 or a folder in finetune.root"),
    ] = None
    root: Annotated[Path | None, Doc("folder of the data set")] = None
    epochs: Annotated[Count, Doc("passes over the training images")] = 200
    batch_size: Annotated[Count, Doc("of all processes together")] = 1024
    lr: Annotated[
        Positive | Annotated[Sequence[Positive], AtLeastOne],
        Doc("one or several learning rates; the best is reported"),
    ] = (8e-4, 9e-4, 1e-3, 2e-3)
    lr_reference_batch: Annotated[
        Count | None, Doc("null: lr as it is; 512: times batch_size / 512, as DeiT's code")
    ] = None
    min_lr: Annotated[Weight, Doc("end of the cosine")] = 1e-6
    warmup_lr: Annotated[Weight, Doc("start of the warm-up")] = 1e-6
    warmup_epochs: Annotated[Whole, Doc("length of the warm-up")] = 20
    warmup_prefix: Annotated[
        bool, Doc("the cosine starts after the warm-up (BEiT), not under it (DeiT)")
    ] = True
    step_on_epochs: Annotated[
        bool, Doc("one learning rate per epoch (DeiT), not per update (BEiT)")
    ] = False
    weight_decay: Annotated[Weight, Doc("of AdamW")] = 0.05
    layer_decay: Annotated[
        Decay | None, Doc("each earlier block learns this much more slowly; null: off")
    ] = 0.75
    drop_path: Annotated[Share, Doc("stochastic depth of the last block")] = 0.1
    clip_grad: Annotated[Positive | None, Doc("largest norm of the gradients; null: off")] = None
    init_scale: Annotated[Weight, Doc("of the classifier's initial weights")] = 0.001
    mixup: Annotated[Weight, Doc("alpha of mixup; 0: off")] = 0.8
    cutmix: Annotated[Weight, Doc("alpha of cutmix; 0: off")] = 1.0
    smoothing: Annotated[Share, Doc("of the labels")] = 0.1
    auto_augment: Annotated[str | None, Doc("timm's RandAugment; null: off")] = (
        "rand-m9-mstd0.5-inc1"
    )
    train_interpolation: Interpolation = "bicubic"
    erasing: Annotated[Share, Doc("probability of random erasing")] = 0.25
    repeated_aug: Annotated[
        Whole, Doc("3: every image three times per draw, each process sees other copies (DeiT)")
    ] = 0
    ema_decay: Annotated[
        Decay | None, Doc("0.99996: scores of the averaged weights beside the others")
    ] = None
    resume: Annotated[bool, Doc("go on with a stopped training in output_dir")] = True

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
        """Refuse a warm-up without a rest, odd batches for mixing, half of a data set (``ValueError``)."""
        super().check()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even for mixup and cutmix")
        if (self.dataset is None) != (self.root is None):
            raise ValueError(
                f"dataset={self.dataset!r} and root={self.root!r} go together: the name of a data "
                "set and the folder that holds it"
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


@dataclass(frozen=True, kw_only=True)
class FinetuneRun(CommonSettings):
    """Everything that ``scripts/finetune.py`` can be told."""

    finetune: FinetuneSettings
