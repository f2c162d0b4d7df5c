"""What ``scripts/video_segmentation.py`` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from dinovmf_plugin.features.settings import Device, NetworkSource
from dinovmf_plugin.runs.bounds import Count, Path, Positive, Seed, Whole
from dinovmf_plugin.runs.settings import Doc

__all__ = ["VideoSettings"]


@dataclass(frozen=True, kw_only=True)
class VideoSettings(NetworkSource):
    """Everything that ``scripts/video_segmentation.py`` can be told; the defaults are DINO's."""

    data_path: Annotated[Path, Doc("DAVIS's folder (ImageSets/, JPEGImages/, Annotations/)")]
    output_dir: Annotated[
        Path,
        Doc("results.json, report.html, masks/; finished sequences are not computed again"),
    ]
    seed: Annotated[Seed, Doc("of the weights of random:TIMM_NAME")] = 0
    split: Annotated[
        str, Doc("ImageSets/YEAR/SPLIT.txt; every frame of its sequences must be annotated")
    ] = "val"
    year: Annotated[str | Whole, Doc("folder of the lists")] = "2017"
    resolution: Annotated[str, Doc("folder below JPEGImages and Annotations")] = "480p"
    sequences: Annotated[Sequence[str] | None, Doc("a list of names; null: all of the split")] = (
        None
    )
    size: Annotated[
        int,
        Ge(64),
        Doc(
            "pixels of the shorter side shown to the backbone; the longer is floored to a multiple "
            "of 64"
        ),
    ] = 480
    context_frames: Annotated[
        Whole, Doc("frames before the current one that are looked at, besides the first")
    ] = 7
    radius: Annotated[
        Whole | None, Doc("patches; how far a patch looks to each side; null: everywhere")
    ] = 12
    topk: Annotated[Count, Doc("context patches kept per patch")] = 5
    temperature: Annotated[Positive, Doc("of the softmax over them")] = 0.1
    contact_sheet: Annotated[
        bool, Doc("contact_sheets/NAME.png: some frames, annotation above prediction")
    ] = True
    animation: Annotated[Literal["webp", "gif"] | None, Doc("annotation beside prediction")] = (
        "webp"
    )
    device: Device = "auto"
