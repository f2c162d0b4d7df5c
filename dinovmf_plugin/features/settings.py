"""What every command that looks at a frozen network asks for: the network, and how images are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from dinovmf_plugin.data.recipe import INTERPOLATIONS
from dinovmf_plugin.data.unreadable import CHECKS
from dinovmf_plugin.runs.bounds import Count, OneOf, Path, Whole
from dinovmf_plugin.runs.settings import Doc, Settings

__all__ = [
    "CheckImages",
    "Device",
    "Feature",
    "Interpolation",
    "NetworkSource",
    "ReadingSettings",
    "Side",
]

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


Feature = Literal["cls", "cls_pre_norm", "dino"] | FeatureKeys


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
class ReadingSettings(Settings):
    """How images are read."""

    batch_size: Annotated[Count, Doc("images per forward pass")] = 64
    num_workers: Annotated[Whole, Doc("processes (DALI: threads) that read images")] = 4
    skip_unreadable: Annotated[
        bool, Doc("leave out images that cannot be read, instead of stopping")
    ] = False
