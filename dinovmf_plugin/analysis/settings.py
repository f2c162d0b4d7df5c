"""What ``scripts/analyze.py`` can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from dinovmf_plugin.analysis.tables import TABLE_FORMATS, check_table_format
from dinovmf_plugin.features.mixture import Weights
from dinovmf_plugin.features.settings import CropSettings, Device, NetworkSource
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Fraction, OneOf, Path, Positive, Whole
from dinovmf_plugin.runs.settings import Doc, Settings

__all__ = ["AnalysisSettings", "DataSettings"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(CropSettings):
    """Images and how they are read."""

    train_path: Annotated[
        Path, Doc("one folder per class, a plain folder of images, or what data.source reads")
    ]
    val_path: Annotated[
        Path | None, Doc("images of the same classes, for Figure 2 and the outliers")
    ] = None
    fraction: Annotated[
        Fraction | Literal[-1], Doc("share of the images, the same of every class; -1: all")
    ] = -1


@dataclass(frozen=True)
class UtilizationSettings(Settings):
    """The sweep of cosine thresholds."""

    thresholds: Annotated[
        Sequence[Annotated[float, Ge(-1), Lt(1)]],
        AtLeastOne,
        Doc("cosines above which two prototypes are duplicates"),
    ] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    components: Annotated[
        bool, Doc("count connected components too, as a check of the greedy cover")
    ] = True


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """kNN accuracy by percentile of the prototypes' norms."""

    bins: Annotated[Count, Doc("percentile ranges of the validation images")] = 10
    k: Annotated[Count, Doc("neighbors")] = 10
    temperature: Annotated[Positive, Doc("of the vote")] = 0.07


@dataclass(frozen=True)
class GallerySettings(Settings):
    """Sheets of images."""

    components: Annotated[
        Whole, Doc("most used components in gallery.html, the first 8 also in analysis.html")
    ] = 60
    images: Annotated[Whole, Doc("images of each")] = 10
    outliers: Annotated[Whole, Doc("least and most likely images")] = 30
    size: Annotated[int, Ge(16), Doc("side of a thumbnail in pixels")] = 96


@dataclass(frozen=True)
class AttentionSettings(Settings):
    """Attention maps of the last block."""

    images: Annotated[Whole, Doc("images with attention maps, evenly spaced; 0: none")] = 8
    path: Annotated[
        Path | None,
        Doc("a folder of which all images get maps; null: data.val_path, else data.train_path"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings(NetworkSource):
    """Everything that ``scripts/analyze.py`` can be told.

    Raises:
        ValueError: naming the key, its value and what would be right.
        ImportError: for ``table=parquet`` without pyarrow.
    """

    output_dir: Annotated[Path, Doc("a new or empty folder, or that of a run of the same settings")]
    data: DataSettings
    name: Annotated[str | None, Doc("name in tables and figures; null: the method's")] = None
    compare: Annotated[
        Mapping[str, Path] | None,
        Doc("other checkpoints in the same tables: {DINO: dino.pth, iBOT: ibot.pth}"),
    ] = None
    weights: Weights = "model"
    table: Annotated[
        str, OneOf(TABLE_FORMATS), Doc("of images.* and components.*; parquet needs pyarrow")
    ] = "csv"
    utilization: UtilizationSettings = field(default_factory=UtilizationSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    gallery: GallerySettings = field(default_factory=GallerySettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    device: Device = "auto"

    def check(self) -> None:
        """Refuse Parquet without pyarrow."""
        check_table_format(self.table)

    @property
    def others(self) -> Mapping[str, str]:
        """Further checkpoints by name."""
        return self.compare or {}

    def identity(self) -> dict[str, Any]:
        """What the results depend on: all but where and how fast they are made."""
        out = asdict(self) | {"compare": dict(self.others)}
        for key in ("output_dir", "device"):
            del out[key]
        for key in ("batch_size", "num_workers"):
            del out["data"][key]
        return out
