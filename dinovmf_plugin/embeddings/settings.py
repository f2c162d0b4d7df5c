"""What ``scripts/embed.py`` can be told."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from dinovmf_plugin.features.images import FORMATS
from dinovmf_plugin.features.mixture import Weights
from dinovmf_plugin.features.settings import (
    CheckImages,
    CropSettings,
    Device,
    Feature,
    NetworkSource,
    Precision,
)
from dinovmf_plugin.runs.bounds import Count, OneOf, Path
from dinovmf_plugin.runs.settings import Doc

__all__ = ["DataSettings", "EmbedSettings", "EmbedderSettings"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(CropSettings):
    """The images, and how they are read."""

    path: Annotated[Path, Doc("a folder of images at any depth, or what data.source reads")]
    format: Annotated[str, OneOf(FORMATS), Doc("read by Pillow or DALI")] = "image_folder"
    check_images: CheckImages = "fast"

    def check(self) -> None:
        """Refuse what tells of other images or of labels, and a crop larger than the resized image."""
        super().check()
        if self.val_split is not None:
            raise ValueError(
                f"val_split={self.val_split!r} is not used: the split of data.path is train_split"
            )
        if self.label_key is not None:
            raise ValueError(f"label_key={self.label_key!r} is not used: no labels are read")


@dataclass(frozen=True, kw_only=True)
class EmbedderSettings(NetworkSource):
    """The network, and what is made of an image."""

    mixture: Annotated[
        bool,
        Doc(
            "component, responsibility and log-likelihood, too; false for a network without a head"
        ),
    ] = True
    weights: Weights = "model"
    feature: Feature = "cls"
    precision: Precision = "float32"
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(EmbedderSettings):
    """Everything that ``scripts/embed.py`` can be told.

    Raises:
        ValueError: naming the key, its value and what would be right.
        ImportError: for ``format=parquet`` without pyarrow.
    """

    output_dir: Annotated[
        Path, Doc("a new or empty folder, or that of a run of the same settings, which goes on")
    ]
    data: DataSettings
    format: Annotated[
        Literal["parquet", "npy", "safetensors"],
        Doc("parquet and safetensors: a file per part; npy: a file per column"),
    ] = "parquet"
    part: Annotated[
        Count, Doc("images that are kept in memory and written together; a stopped run repeats one")
    ] = 16384
    progress: Annotated[bool, Doc("show a progress bar")] = True

    def check(self) -> None:
        """Refuse parts that end within a batch, and Parquet without pyarrow."""
        batch = self.data.batch_size
        if self.part % batch:
            fitting = -(-self.part // batch) * batch
            raise ValueError(
                f"part={self.part} must be a multiple of data.batch_size={batch}, such as {fitting}"
            )
        if self.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ImportError(
                "format=parquet needs pyarrow: pip install 'dinovmf-plugin[analysis]', or use format=npy"
            )

    def identity(self) -> dict[str, Any]:
        """What the table depends on: all but where and how fast it is made, and where the files lie."""
        out = asdict(self)
        for key in ("checkpoint", "weight_file", "output_dir", "device", "progress"):
            del out[key]
        for key in ("path", "batch_size", "num_workers", "skip_unreadable", "check_images"):
            del out["data"][key]
        return out
