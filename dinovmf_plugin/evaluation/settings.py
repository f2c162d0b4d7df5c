"""What all evaluations can be told: the network, the data, and a section per evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.images import FORMATS
from dinovmf_plugin.features.settings import (
    CheckImages,
    Device,
    Feature,
    Interpolation,
    NetworkSource,
    Precision,
    ReadingSettings,
    Side,
)
from dinovmf_plugin.runs.bounds import Count, OneOf, Path, Seed
from dinovmf_plugin.runs.settings import Doc, Settings, settings_of

__all__ = [
    "BASELINES",
    "CommonSettings",
    "DataSettings",
    "EvaluationSettings",
    "OneFeature",
    "Section",
]

BASELINES = ("untrained", "pixels")


@dataclass(frozen=True)
class Section(Settings):
    """Settings of one evaluation; all have a deterministic test transform."""

    name: ClassVar[str]
    resize: Annotated[Count, Doc("shorter side of the resized image in pixels")] = 256
    crop_size: Side = 224
    interpolation: Interpolation = "bicubic"

    @property
    def wanted(self) -> Sequence[Feature]:
        """The features that the evaluation reads."""
        return ()

    @property
    def transform(self) -> CenterCrop:
        """The test transform, without the network's own channel statistics."""
        return CenterCrop(self.resize, self.crop_size, self.interpolation)

    def check(self) -> None:
        """Refuse a crop that is larger than the resized image (``ValueError``)."""
        if self.crop_size > self.resize:
            raise ValueError(f"crop_size={self.crop_size} must be at most resize={self.resize}")


@dataclass(frozen=True)
class OneFeature(Section):
    """Settings of an evaluation that reads one feature."""

    feature: Feature = "cls"

    @property
    def wanted(self) -> Sequence[Feature]:
        """The features that the evaluation reads."""
        return (self.feature,)


@dataclass(frozen=True, kw_only=True)
class DataSettings(ReadingSettings):
    """The images, and how they are read."""

    train_path: Annotated[
        Path | None, Doc("a folder of class folders, or what data.source reads")
    ] = None
    val_path: Annotated[Path | None, Doc("the same classes, or some of them")] = None
    format: Annotated[
        str, OneOf(FORMATS), Doc("Pillow or DALI, for every pass without augmentation")
    ] = "image_folder"
    check_images: CheckImages = "fast"


@dataclass(frozen=True, kw_only=True)
class CommonSettings(NetworkSource):
    """What frozen evaluation and fine-tuning share: the network, the images, the machine."""

    output_dir: Annotated[Path, Doc("the JSON, the HTML page and the features go there")]
    data: DataSettings = field(default_factory=DataSettings)
    device: Device = "auto"
    precision: Precision = "float32"
    seed: Annotated[
        Seed, Doc("of untrained weights, drawn splits, folds, probes and classifiers")
    ] = 0
    progress: Annotated[bool, Doc("show progress bars")] = True


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(CommonSettings):
    """A whole run: one network, the data, and the chosen evaluations.

    ``protocols.AllSettings`` adds one section per evaluation that there is.
    """

    evaluations: Annotated[Sequence[str], Doc("what is evaluated")]
    baselines: Annotated[
        Sequence[Annotated[str, OneOf(BASELINES)]],
        Doc("evaluated beside it: the same architecture with random weights, raw pixels"),
    ] = ()
    cache_dir: Annotated[
        Path | None, Doc("features are kept here and used again; null: output_dir/features")
    ] = None
    cache_dtype: Annotated[
        Literal["float32", "float16"], Doc("of the kept features; float16 is half as large")
    ] = "float32"

    @property
    def sections(self) -> Mapping[str, Section]:
        """Settings of every evaluation, by name."""
        kinds = {name: setting.group for name, setting in settings_of(type(self)).items()}
        return {n: getattr(self, n) for n, k in kinds.items() if k and issubclass(k, Section)}

    def check(self) -> None:
        """Refuse an evaluation that is named twice (``ValueError``)."""
        if len(set(self.evaluations)) < len(self.evaluations):
            raise ValueError(f"evaluations={list(self.evaluations)} must name each once")
