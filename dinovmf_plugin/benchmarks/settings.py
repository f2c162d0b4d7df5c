"""What every topic of ``scripts/benchmark.py`` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

from annotated_types import Ge, Le, MinLen
from pydantic import StringConstraints

from dinovmf_plugin.evaluation.logistic.transfer import WEIGHT_DECAYS
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Path, Positive, Whole, Words
from dinovmf_plugin.runs.settings import Doc, Settings

__all__ = [
    "PATCH",
    "TOPIC_SETTINGS",
    "BenchmarkSettings",
    "DataSettings",
    "FeedSettings",
    "GpuSettings",
    "GrowthSettings",
    "KnnSettings",
    "LossSettings",
    "MemorySettings",
    "MixtureCandidate",
    "MixtureSettings",
    "Part",
    "StepSettings",
    "TransferSettings",
]

#: side of a patch of the steps' ViTs
PATCH = 16

Counts: TypeAlias = Annotated[Sequence[Count], AtLeastOne]
Bank = Annotated[
    str,
    StringConstraints(pattern="^[1-9][0-9]*x[1-9][0-9]*$"),
    Words("ROWSxDIMENSIONS, such as 200000x384"),
]
Blobs = Annotated[
    str,
    StringConstraints(pattern="^([2-9]|[1-9][0-9]+)(x([2-9]|[1-9][0-9]+)){2}$"),
    Words("ROWSxDIMENSIONSxCOMPONENTS, such as 50000x64x32"),
]
Figure = Annotated[
    str,
    StringConstraints(pattern=r"\.(svg|png|pdf)$"),
    Words("a path that ends in .svg, .png or .pdf"),
]
LossPrecision = Literal["float32", "bf16"]
LossCandidate = Literal["none", "vmf", "eager", "lightly", "per_pair", "products"]
StepCandidate = Literal[
    "dino_vmf", "dino_vmf none", "dino_vmf compiled", "dino_multicrop", "lightly", "host"
]
FeedCandidate = Literal["step", "dali", "torchvision", "compiled"]
MemoryCandidate = Literal["ibot", "ibot_vmf", "plain"]
KnnCandidate = Literal["ours", "faiss"]
MixtureCandidate = Literal["ours", "chemomae", "gaussian"]
Part = Literal["loss", "step", "host", "tests", "feed", "data", "growth"]
Sizes: TypeAlias = Annotated[Sequence[Count], MinLen(2)]
Images = Annotated[Count, Doc("images")]
Prototypes = Annotated[Count, Doc("K")]
Bottleneck = Annotated[Count, Doc("dimensions of a bottleneck vector")]
Repeats = Annotated[Count, Doc("times that each candidate is measured")]
LocalCrops = Annotated[Whole, Doc("local crops, besides two global ones")]
Peaks = Annotated[bool, Doc("peak memory, too; false or 0: times only")]
LightningPrecision = Annotated[str, Doc("Lightning's")]
Workers = Annotated[Count, Doc("worker processes of torchvision, threads of DALI")]
Folder = Annotated[Path | None, Doc("images of your own, at any depth, instead of generated ones")]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Settings):
    """What all topics share."""

    output: Annotated[
        Path | None, Doc("JSON file; written only if given, never over an existing one")
    ] = None


@dataclass(frozen=True, kw_only=True)
class LossSettings(BenchmarkSettings):
    """Of the topic ``loss``."""

    batch: Annotated[Counts, Doc("images, one run each")] = (16, 64)
    precision: Annotated[Sequence[LossPrecision], AtLeastOne, Doc("one run each")] = (
        "float32",
        "bf16",
    )
    device: Annotated[Literal["cpu", "cuda"], Doc("of all tensors")] = "cpu"
    prototypes: Prototypes = 65536
    dim: Bottleneck = 256
    crops: LocalCrops = 10
    repeats: Repeats = 7
    slow_seconds: Annotated[
        Positive, Doc("a candidate whose first step takes longer is repeated 3 times only")
    ] = 3.0
    memory: Peaks = True
    candidates: Annotated[
        Sequence[LossCandidate], AtLeastOne, Doc("eager is of interest on a GPU")
    ] = ("none", "vmf", "lightly", "per_pair", "products")


@dataclass(frozen=True, kw_only=True)
class StepSettings(BenchmarkSettings):
    """Of the topic ``step``."""

    batch: Images = 8
    crops: LocalCrops = 0
    backbone: Annotated[str, Doc("a ViT's name")] = "vit_small"
    size: Annotated[
        int, Ge(PATCH), Doc("of global crops; local ones have 96 / 224 of it, in whole patches")
    ] = 224
    prototypes: Prototypes = 65536
    precision: LightningPrecision = "32-true"
    accelerator: Annotated[Literal["cpu", "gpu"], Doc("Lightning's")] = "cpu"
    batches: Annotated[
        Literal["device", "pinned", "pageable"],
        Doc("where they lie on a GPU: device, as DALI gives them; pinned, as torchvision does"),
    ] = "pinned"
    candidates: Annotated[
        Sequence[StepCandidate], AtLeastOne, Doc("dino_vmf, which all are compared to, is one")
    ] = ("dino_vmf", "dino_vmf none", "dino_multicrop", "lightly", "host")
    peak_tflops: Annotated[
        Positive, Doc("of the card in this precision: H100 with dense bf16 products")
    ] = 989.0
    rounds: Annotated[Count, Doc("turns of each candidate")] = 5
    steps: Annotated[Count, Doc("measured steps of a turn; two more warm up")] = 4

    def check(self) -> None:
        """Refuse candidates without the one that they are compared to."""
        if "dino_vmf" not in self.candidates:
            raise ValueError(
                f"candidates={','.join(self.candidates)} must have dino_vmf among them, which all "
                "others are compared to"
            )


@dataclass(frozen=True, kw_only=True)
class GrowthSettings(BenchmarkSettings):
    """Of the topic ``growth``."""

    prototypes: Annotated[Sizes, Doc("of the loss, at the first batch")] = (
        1024,
        4096,
        16384,
        65536,
        262144,
    )
    batches: Annotated[Sizes, Doc("images, at the middle number of prototypes")] = (16, 64, 256)
    banks: Annotated[Sequence[Count], Doc("rows of kNN, 384 dimensions; empty: no kNN")] = (
        1000,
        10000,
        100000,
    )
    precision: Annotated[LossPrecision, Doc("of the loss")] = "float32"
    device: Annotated[Literal["cpu", "cuda"], Doc("of the loss")] = "cpu"
    repeats: Repeats = 3
    memory: Peaks = True
    figure: Annotated[Figure | None, Doc("drawn only if given, never over an existing one")] = None

    def check(self) -> None:
        """Refuse a curve of one point."""
        if len(self.banks) == 1:
            raise ValueError(
                f"banks={self.banks[0]} must be at least two sizes, such as 1000,10000"
            )


@dataclass(frozen=True, kw_only=True)
class GpuSettings(BenchmarkSettings):
    """Of the topic ``gpu``."""

    seconds: Annotated[Count, Doc("of all parts together")] = 480
    parts: Annotated[Sequence[Part], AtLeastOne, Doc("in this order")] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class DataSettings(BenchmarkSettings):
    """Of the topic ``data``."""

    images: Annotated[Count, Doc("files, generated where folder is not given")] = 256
    batch: Images = 32
    workers: Workers = 2
    rounds: Annotated[Count, Doc("epochs of each loader, taking turns")] = 5
    device: Annotated[Literal["cpu", "gpu"], Doc("of DALI")] = "cpu"
    recipe: Annotated[str, Doc("a file of configs/augmentations")] = "dino_multicrop"
    folder: Folder = None


@dataclass(frozen=True, kw_only=True)
class FeedSettings(BenchmarkSettings):
    """Of the topic ``feed``."""

    recipe: Annotated[str, Doc("see dinovmf recipes")] = "imagenet/dino_vmf_vits16"
    batch: Images = 64
    workers: Workers = 8
    device: Annotated[Literal["cpu", "gpu"], Doc("of the step and of DALI")] = "cpu"
    precision: LightningPrecision = "32-true"
    steps: Annotated[Count, Doc("measured")] = 30
    warmup: Annotated[Whole, Doc("steps before")] = 10
    photos: Annotated[Count, Doc("different files; further names link to them")] = 256
    folder: Folder = None
    candidates: Annotated[Sequence[FeedCandidate], AtLeastOne, Doc("who takes part")] = (
        "step",
        "dali",
        "torchvision",
    )
    overrides: Annotated[str, Doc("of the recipe, separated by blanks")] = ""


@dataclass(frozen=True, kw_only=True)
class MemorySettings(BenchmarkSettings):
    """Of the topic ``memory``."""

    batch: Images = 64
    crops: LocalCrops = 10
    grid: Annotated[Count, Doc("patches in a row and in a column of a global crop")] = 14
    prototypes: Prototypes = 8192
    dim: Bottleneck = 256
    candidates: Annotated[Sequence[MemoryCandidate], AtLeastOne, Doc("who takes part")] = get_args(
        MemoryCandidate
    )


@dataclass(frozen=True, kw_only=True)
class KnnSettings(BenchmarkSettings):
    """Of the topic ``knn``."""

    shapes: Annotated[Sequence[Bank], AtLeastOne, Doc("banks")] = ("200000x384", "1280000x768")
    queries: Annotated[Count, Doc("rows looked up in a bank")] = 1000
    ks: Annotated[Counts, Doc("numbers of neighbors")] = (10, 20, 100, 200)
    classes: Annotated[Count, Doc("of bank and queries")] = 1000
    dtype: Annotated[Literal["float32", "float16"], Doc("of the bank")] = "float32"
    repeats: Repeats = 3
    memory: Peaks = True
    candidates: Annotated[Sequence[KnnCandidate], AtLeastOne, Doc("who takes part")] = get_args(
        KnnCandidate
    )


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(BenchmarkSettings):
    """Of the topic ``mixture``."""

    shapes: Annotated[Sequence[Blobs], AtLeastOne, Doc("fitted problems")] = (
        "50000x64x32",
        "50000x256x64",
    )
    held_out: Annotated[Count, Doc("rows")] = 10_000
    max_iter: Annotated[Count, Doc("passes of a fit at most")] = 100
    seeds: Annotated[Count, Doc("fits of each candidate")] = 3
    memory: Peaks = True
    candidates: Annotated[Sequence[MixtureCandidate], AtLeastOne, Doc("who takes part")] = get_args(
        MixtureCandidate
    )


@dataclass(frozen=True, kw_only=True)
class TransferSettings(BenchmarkSettings):
    """Of the topic ``transfer``."""

    rows: Annotated[Count, Doc("training images; a fifth as many for the test")] = 5000
    dim: Annotated[Count, Doc("of a feature")] = 384
    classes: Annotated[Count, Doc("evenly filled")] = 100
    values: Annotated[
        int,
        Ge(1),
        Le(len(WEIGHT_DECAYS)),
        Doc("strengths, evenly out of the protocol's"),
    ] = len(WEIGHT_DECAYS)
    folds: Annotated[int, Ge(2), Doc("of the cross-validation")] = 5
    n_jobs: Annotated[Counts, Doc("folds at once, in threads that share the cores")] = (1, 2)


#: topic -> its settings
TOPIC_SETTINGS: dict[str, type[BenchmarkSettings]] = {
    "loss": LossSettings,
    "step": StepSettings,
    "growth": GrowthSettings,
    "gpu": GpuSettings,
    "data": DataSettings,
    "feed": FeedSettings,
    "memory": MemorySettings,
    "knn": KnnSettings,
    "mixture": MixtureSettings,
    "transfer": TransferSettings,
}
