"""What ``scripts/analyze.py`` can be told; configs/analyze.yaml explains every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from dinovmf_plugin.analysis.measurements import WEIGHTS
from dinovmf_plugin.analysis.tables import check_table_format
from dinovmf_plugin.runs.settings import build

__all__ = [
    "AnalysisSettings",
    "AttentionSettings",
    "DataSettings",
    "GallerySettings",
    "PrecisionSettings",
    "UtilizationSettings",
]


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name}={value} must be at least {low}")


@dataclass(frozen=True)
class DataSettings:
    """Images and how they are read."""

    train_path: str | None = None
    val_path: str | None = None
    fraction: float = -1
    crop_size: int | None = None
    resize: int | None = None
    interpolation: str = "bicubic"
    batch_size: int = 64
    num_workers: int = 4
    skip_unreadable: bool = False


@dataclass(frozen=True)
class UtilizationSettings:
    """The sweep of cosine thresholds."""

    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    components: bool = True


@dataclass(frozen=True)
class PrecisionSettings:
    """kNN accuracy by percentile of the prototypes' norms."""

    bins: int = 10
    k: int = 10
    temperature: float = 0.07


@dataclass(frozen=True)
class GallerySettings:
    """Sheets of images."""

    components: int = 60
    images: int = 10
    outliers: int = 30
    size: int = 96


@dataclass(frozen=True)
class AttentionSettings:
    """Attention maps of the last block."""

    images: int = 8
    path: str | None = None


@dataclass(frozen=True)
class AnalysisSettings:
    """Everything; see configs/analyze.yaml."""

    checkpoint: str | None = None
    output_dir: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    which: Literal["teacher", "student"] = "teacher"
    model_name: str | None = None
    num_heads: int | None = None
    name: str | None = None
    compare: Mapping[str, str] = field(default_factory=dict)
    weights: str = "model"
    table: str = "csv"
    utilization: UtilizationSettings = field(default_factory=UtilizationSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    gallery: GallerySettings = field(default_factory=GallerySettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    device: str = "auto"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AnalysisSettings:
        """Read plain containers, as hydra resolves them.

        Raises:
            ValueError: for a key that does not exist, or a value of another type.

        Example:
            >>> AnalysisSettings.from_config({"data": {"train_path": "photos"}}).data.train_path
            'photos'
        """
        parts = {
            "data": DataSettings,
            "utilization": UtilizationSettings,
            "precision": PrecisionSettings,
            "gallery": GallerySettings,
            "attention": AttentionSettings,
        }
        values = dict(config)
        for key, kind in parts.items():
            values[key] = build(kind, values.get(key) or {}, f"{key}.")
        values["compare"] = values.get("compare") or {}
        settings: AnalysisSettings = build(cls, values, "")
        return settings

    def check(self) -> None:
        """Refuse what cannot work, before anything is read.

        Raises:
            ValueError: naming the key, its value and what would be right.
            ImportError: for ``table=parquet`` without pyarrow.
        """
        for key, value in (
            ("checkpoint", self.checkpoint),
            ("output_dir", self.output_dir),
            ("data.train_path", self.data.train_path),
        ):
            if not value:
                raise ValueError(f"{key}={value!r} must be set to a path")
        for key, value, choices in (
            ("which", self.which, ("teacher", "student")),
            ("weights", self.weights, WEIGHTS),
        ):
            if value not in choices:
                raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(choices)}")
        check_table_format(self.table)
        thresholds = self.utilization.thresholds
        if not thresholds or any(not -1 <= value < 1 for value in thresholds):
            raise ValueError(
                f"utilization.thresholds={list(thresholds)} must be cosines in [-1, 1), such as [0.9]"
            )
        _at_least("data.batch_size", self.data.batch_size, 1)
        _at_least("data.num_workers", self.data.num_workers, 0)
        _at_least("precision.bins", self.precision.bins, 1)
        _at_least("precision.k", self.precision.k, 1)
        if not self.precision.temperature > 0:
            raise ValueError(
                f"precision.temperature={self.precision.temperature} must be greater than 0"
            )
        for item in fields(self.gallery):
            low = 16 if item.name == "size" else 0
            _at_least(f"gallery.{item.name}", getattr(self.gallery, item.name), low)
        _at_least("attention.images", self.attention.images, 0)

    def identity(self) -> dict[str, Any]:
        """What the results depend on: all but where and how fast they are made."""
        out = asdict(self)
        for key in ("output_dir", "device"):
            del out[key]
        for key in ("batch_size", "num_workers"):
            del out["data"][key]
        return out
