"""What every command that looks at a frozen network asks for: the network, and how images are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.recipe import INTERPOLATIONS
from dinovmf_plugin.data.unreadable import CHECKS
from dinovmf_plugin.runs.bounds import Count, OneOf, Path, Whole
from dinovmf_plugin.runs.settings import Doc, Settings
from dinovmf_plugin.runs.sources import SourceKeys

__all__ = [
    "PRECISIONS",
    "CheckImages",
    "CropSettings",
    "Device",
    "Feature",
    "Interpolation",
    "NetworkSource",
    "Precision",
    "ReadingSettings",
    "Side",
]

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Precision = Annotated[str, OneOf(PRECISIONS), Doc("of the backbone's forward pass (autocast)")]
Interpolation = Annotated[str, OneOf(INTERPOLATIONS), Doc("of the resizing")]
Device = Annotated[str, Doc("auto, cpu, cuda, cuda:1 ...")]
Side = Annotated[Count, Doc("side of the center crop in pixels")]
CheckImages = Annotated[str, OneOf(CHECKS), Doc("look for unreadable images first")]


@with_config(ConfigDict(extra="forbid"))
class FeatureKeys(TypedDict, total=False):
    """A feature of a ViT by its parts, see ``extraction.FeatureSpec``."""

    n_last_blocks: Count
    avgpool: bool
    final_norm: bool


Feature = Annotated[
    Literal["cls", "cls_pre_norm", "dino"] | FeatureKeys,
    Doc(
        "cls: CLS after the final norm; cls_pre_norm: before it; dino: [D] of the linear "
        "evaluation; or {n_last_blocks: , avgpool: , final_norm: }"
    ),
]


@dataclass(frozen=True, kw_only=True)
class NetworkSource(Settings):
    """Where a frozen network comes from."""

    checkpoint: Annotated[
        Path,
        Doc(
            "training .ckpt, official .pth, .safetensors or exported folder; random:TIMM_NAME "
            "(untrained), timm:TIMM_NAME (with weight_file) or pixels where no head is needed"
        ),
    ]
    weight_file: Annotated[
        Path | None, Doc("local file with the weights of timm:TIMM_NAME; nothing is downloaded")
    ] = None
    which: Annotated[
        Literal["teacher", "student"], Doc("of its two networks; the papers evaluate the teacher")
    ] = "teacher"
    model_name: Annotated[
        str | None, Doc("vit_tiny .. vit_huge, where the number of heads cannot be inferred")
    ] = None
    num_heads: Annotated[Count | None, Doc("attention heads, for other sizes")] = None


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(SourceKeys):
    """How images are read."""

    batch_size: Annotated[Count, Doc("images per forward pass")] = 64
    num_workers: Annotated[Whole, Doc("processes (DALI: threads) that read images")] = 4
    skip_unreadable: Annotated[
        bool, Doc("leave out images that cannot be read, instead of stopping")
    ] = False


@dataclass(frozen=True, kw_only=True)
class CropSettings(ReadingSettings):
    """How images are read and cropped, by default to what the backbone was made for."""

    crop_size: Annotated[
        Side | None, Doc("side of the center crop; null: what the backbone was made for")
    ] = None
    resize: Annotated[
        Count | None, Doc("shorter side before the crop; null: crop_size * 256 / 224")
    ] = None
    interpolation: Interpolation = "bicubic"

    def check(self) -> None:
        """Refuse a crop that is larger than the resized image."""
        if self.crop_size and self.resize and self.crop_size > self.resize:
            raise ValueError(f"crop_size={self.crop_size} must be at most resize={self.resize}")

    def transform(self, image_size: int) -> CenterCrop:
        """The test transform, without the network's own channel statistics.

        Args:
            image_size: what the backbone was made for, in pixels.

        Example:
            >>> CropSettings().transform(224).resize, CropSettings(crop_size=112).transform(224).resize
            (256, 128)
        """
        size = self.crop_size or image_size
        return CenterCrop(self.resize or round(size * 256 / 224), size, self.interpolation)
