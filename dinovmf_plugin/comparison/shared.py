"""What all runs of a comparison share, and one run of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from annotated_types import Ge, Lt
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.evaluation.protocols import PROTOCOLS, Evaluations, evaluation_settings
from dinovmf_plugin.evaluation.settings import BASELINES
from dinovmf_plugin.recipes import Candidate, compose_recipe
from dinovmf_plugin.runs import bounds
from dinovmf_plugin.runs.bounds import (
    AtLeastOne,
    Count,
    Fraction,
    OneOf,
    Seed,
    Whole,
)
from dinovmf_plugin.runs.settings import Doc, Settings

__all__ = ["ComparisonData", "ComparisonSettings", "RunSettings"]

_BY_RUN = ("checkpoint", "output_dir", "evaluations", "baselines", "cache_dir", "progress")

DemoName = Annotated[
    str, OneOf(demo_data.DATASETS), Doc("pictures installed by pip, never downloaded here")
]


@dataclass(frozen=True)
class ComparisonData(Settings):
    """The images of a comparison."""

    train_path: Annotated[
        bounds.Path | None,
        Doc("one folder per class; null: the recipe's own, else the demo pictures"),
    ] = None
    val_path: Annotated[bounds.Path | None, Doc("held-out images of the same classes")] = None
    demo: DemoName = "photographs"
    demo_fraction: Annotated[
        Fraction, Doc("share of the demo pictures, the same of every class")
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings, ABC):
    """What all runs of one comparison share."""

    kind: ClassVar[str]
    output_dir: Annotated[
        bounds.Path,
        Doc("a new or empty folder, or that of a comparison with the same settings"),
    ]
    recipe: Annotated[
        str, Doc("any recipe of configs/ or of --config-dir, such as imagenet/dino_vits16")
    ] = "demo_recipe"
    overrides: Annotated[Sequence[str], Doc("of the recipe, in hydra's syntax")] = ()
    data: ComparisonData = field(default_factory=ComparisonData)
    gpus: Annotated[
        Sequence[Whole] | None, Doc("for parallel jobs on one machine, one GPU each: [0, 1, 2, 3]")
    ] = None
    image_size: Annotated[
        Count | None,
        Doc("side of the evaluation's crops; null: the recipe's backbone.kwargs.img_size"),
    ] = None
    k: Annotated[Count, Doc("neighbors of the headline")] = 10
    curve_every: Annotated[
        Whole, Doc("epochs between two kNN evaluations while training; 0: never")
    ] = 0
    evaluations: Evaluations = ("knn",)
    baselines: Annotated[Sequence[Annotated[str, OneOf(BASELINES)]], Doc("beside it, with kNN")] = (
        "untrained",
    )
    keep_features: Annotated[bool, Doc("keep the extracted features of finished runs")] = False
    thresholds: Annotated[
        Sequence[Annotated[float, Ge(-1), Lt(1)]],
        AtLeastOne,
        Doc("cosines of the prototype utilization"),
    ] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    evaluation: Annotated[
        Mapping[str, Any],
        Doc("keys of evaluate; resize and crop_size count for 224 px and are scaled"),
    ] = field(default_factory=dict)
    seeds: Annotated[Sequence[Seed], AtLeastOne, Doc("of the runs")] = (0, 1, 2)
    seed: Annotated[Seed | None, Doc("set by the sweep")] = None

    def check(self) -> None:
        """Refuse what cannot work before anything is trained."""
        for key in ("seeds", "methods", "normalizations", "centerings"):
            values = list(getattr(self, key, ()))
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={values!r} names a value twice")
        if "knn" not in self.evaluations:
            raise ValueError(f"evaluations={list(self.evaluations)} must include knn, the headline")
        ks = (self.evaluation.get("knn") or {}).get("ks", (10, 20, 100, 200))
        if isinstance(ks, Sequence) and self.k not in ks:
            raise ValueError(f"k={self.k} must be one of evaluation.knn.ks={list(ks)}")
        for key in ("checkpoint", "output_dir", "cache_dir"):
            if self.evaluation.get(key):
                raise ValueError(f"evaluation.{key} is set by every run itself: leave it null")
        for key in ("train_path", "val_path"):
            if (self.evaluation.get("data") or {}).get(key):
                raise ValueError(f"evaluation.data.{key} is not used: set data.{key}")
        self.evaluation_config("checkpoint", "folder", 224, {})

    def evaluation_config(
        self, checkpoint: str, folder: str, size: int, data: Mapping[str, str | None]
    ) -> dict[str, Any]:
        """Plain config for ``evaluation.runner.evaluate``; crops scaled from 224 to ``size`` pixels.

        Raises:
            ValueError: if a setting cannot work.
        """
        config = {key: value for key, value in self.evaluation.items() if key not in _BY_RUN}
        for name, protocol in PROTOCOLS.items():
            section = dict(config.get(name) or {})
            for key in ("resize", "crop_size"):
                default = cast(int, section.get(key, getattr(protocol.settings, key)))
                section[key] = round(default * size / 224)
            config[name] = section
        config["data"] = {**(config.get("data") or {}), **data}
        config |= {
            "checkpoint": checkpoint,
            "output_dir": folder,
            "cache_dir": str(Path(folder) / "features"),
            "evaluations": list(self.evaluations),
            "baselines": [],
        }
        evaluation_settings(config, prefix="evaluation.")
        return config

    def identity(self) -> dict[str, Any]:
        """What makes results comparable: all but where and on how many GPUs they are made."""
        own = {f.name for f in fields(ComparisonSettings)}
        plain = {key: value for key, value in asdict(self).items() if key in own}
        for key in ("output_dir", "gpus", "keep_features", "seeds", "seed"):
            del plain[key]
        plain |= {"kind": self.kind, **plain.pop("data")}
        plain["evaluation"] = {
            key: value for key, value in self.evaluation.items() if key not in ("device", *_BY_RUN)
        }
        return plain

    def fixed(self) -> dict[str, Any]:
        """Further keys that all runs share and that bind the folder."""
        return {}

    @abstractmethod
    def runs(self) -> list[RunSettings]:
        """Every run that the lists describe."""

    @abstractmethod
    def job(self) -> RunSettings:
        """The run of one job of the sweep, by the keys that the sweep sets."""

    def _swept_seed(self) -> int:
        if self.seed is None:
            raise ValueError("seed=None must be a whole number, or swept by hydra")
        return self.seed

    def data_paths(self, recipe: DictConfig) -> dict[str, str | None]:
        """Training and validation folders of a recipe: given, its own, or the demo pictures.

        Raises:
            ValueError: if only one of the two is given.
        """
        own = {
            key: OmegaConf.select(recipe, f"data.{key}", throw_on_missing=False)
            for key in ("train_path", "val_path")
        }
        given = {"train_path": self.data.train_path, "val_path": self.data.val_path}
        paths = {key: given[key] or own[key] for key in given}
        if paths["train_path"] is None and paths["val_path"] is None:
            pictures = Path(self.output_dir) / "data"
            return {key: str(pictures / key.split("_")[0]) for key in paths}
        for key, path in paths.items():
            if path is None:
                raise ValueError(
                    f"data.{key} is missing: give labeled images of the same classes as in the other "
                    "folder, or neither for the demo pictures"
                )
        return paths

    def build_demo(self) -> None:
        """Write the demo pictures into ``output_dir/data``, unless they are there."""
        folder = Path(self.output_dir) / "data"
        demo_data.build(folder, self.data.demo, fraction=self.data.demo_fraction)

    def uses_demo(self, recipe: DictConfig) -> bool:
        """Whether the recipe would train on the demo pictures of ``output_dir/data``."""
        return self.data_paths(recipe)["train_path"] == str(
            Path(self.output_dir) / "data" / "train"
        )


@dataclass(frozen=True)
class RunSettings:
    """One run: what is trained, with which seed and learning rate."""

    comparison: ComparisonSettings
    candidate: Candidate
    seed: int
    lr: float | None = None

    def recipe(self) -> DictConfig:
        """The run's recipe with its data, not yet parsed.

        Raises:
            ValueError: if recipe, overrides or data do not fit.
        """
        shared = self.comparison
        runs = str(Path(shared.output_dir) / "runs")
        options: dict[str, Any] = {
            "seed": self.seed,
            "lr": self.lr,
            "overrides": shared.overrides,
            "checkpoint_dir": runs,
        }
        bare = compose_recipe(shared.recipe, self.candidate, **options)
        return compose_recipe(
            shared.recipe, self.candidate, data=shared.data_paths(bare), **options
        )
