"""Every knob of a comparison; configs/ablation.yaml and configs/compare.yaml explain each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.evaluation.protocols import PROTOCOLS, evaluation_settings
from dinovmf_plugin.recipes import Candidate, check_method, compose_recipe

__all__ = ["ComparisonSettings", "RunSettings"]

KINDS = ("ablation", "compare")
_BY_RUN = ("checkpoint", "output_dir", "evaluations", "baselines", "cache_dir", "progress")


@dataclass(frozen=True)
class ComparisonSettings:
    """What all runs of one comparison share.

    Attributes:
        kind: ``ablation`` (Table 1) or ``compare``.
        output_dir: everything is written there.
        recipe: config of the recipe.
        overrides: of the recipe, in hydra's syntax.
        train_path: training images; None keeps the recipe's, or the demo pictures if it has none.
        val_path: held-out images, likewise.
        demo: name of the demo pictures.
        demo_fraction: share of them to use.
        gpus: GPUs of this machine for parallel jobs, one each; None leaves the choice to the recipe.
        image_size: side of the evaluation's crops; None is the recipe's ``backbone.kwargs.img_size``.
        k: neighbours of the headline.
        curve_every: epochs between two kNN evaluations while training; 0 is never.
        evaluations: of ``knn, linear, few_shot, transfer``.
        baselines: of ``untrained, pixels``, evaluated with kNN.
        keep_features: whether to keep the extracted features of finished runs.
        thresholds: cosines of the utilisation sweep.
        evaluation: sections and common keys of the evaluations, see configs/evaluation.
    """

    kind: str
    output_dir: str
    recipe: str = "demo_recipe"
    overrides: Sequence[str] = ()
    train_path: str | None = None
    val_path: str | None = None
    demo: str = "animal-mnist"
    demo_fraction: float = 1.0
    gpus: Sequence[int] | None = None
    image_size: int | None = None
    k: int = 10
    curve_every: int = 0
    evaluations: Sequence[str] = ("knn",)
    baselines: Sequence[str] = ("untrained",)
    keep_features: bool = False
    thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            ValueError: naming the key, its value and what would be right.
        """
        if not self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r} must name a folder")
        if "knn" not in self.evaluations:
            raise ValueError(f"evaluations={list(self.evaluations)} must include knn, the headline")
        ks = self.evaluation.get("knn", {}).get("ks", (10, 20, 100, 200))
        if self.k not in ks:
            raise ValueError(f"k={self.k} must be one of evaluation.knn.ks={list(ks)}")
        if self.curve_every < 0:
            raise ValueError(f"curve_every={self.curve_every} must be 0 (never) or more epochs")
        if self.demo not in demo_data.DATASETS:
            raise ValueError(f"data.demo={self.demo!r} is unknown: {sorted(demo_data.DATASETS)}")
        if not 0 < self.demo_fraction <= 1:
            raise ValueError(
                f"data.demo_fraction={self.demo_fraction} must be above 0 and at most 1"
            )
        for key in ("checkpoint", "output_dir", "cache_dir"):
            if self.evaluation.get(key):
                raise ValueError(f"evaluation.{key} is set by every run itself: leave it null")
        for key in ("train_path", "val_path"):
            if self.evaluation.get("data", {}).get(key):
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
        evaluation_settings(config)
        return config

    def identity(self) -> dict[str, Any]:
        """What makes results comparable: all but where and on how many GPUs they are made."""
        plain: dict[str, Any] = asdict(self)
        for key in ("output_dir", "gpus", "keep_features"):
            del plain[key]
        plain["evaluation"] = {
            key: value
            for key, value in plain["evaluation"].items()
            if key not in ("device", *_BY_RUN)
        }
        return plain

    def data_paths(self, recipe: DictConfig) -> dict[str, str | None]:
        """Training and validation folders of a recipe: given, its own, or the demo pictures.

        Raises:
            ValueError: if only one of the two is given.
        """
        own = {
            key: OmegaConf.select(recipe, f"data.{key}", throw_on_missing=False)
            for key in ("train_path", "val_path")
        }
        given = {"train_path": self.train_path, "val_path": self.val_path}
        paths = {key: given[key] or own[key] for key in given}
        if paths["train_path"] is None and paths["val_path"] is None:
            pictures = Path(self.output_dir) / "data"
            return {key: str(pictures / key.split("_")[0]) for key in paths}
        for key, path in paths.items():
            if path is None:
                raise ValueError(
                    f"data.{key} is missing: give labelled images of the same classes as in the other "
                    "folder, or neither for the demo pictures"
                )
        return paths

    def build_demo(self) -> None:
        """Write the demo pictures into ``output_dir/data``, unless they are there."""
        folder = Path(self.output_dir) / "data"
        demo_data.build(folder, self.demo, fraction=self.demo_fraction)

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | DictConfig, kind: str) -> RunSettings:
        """From configs/ablation.yaml or configs/compare.yaml as one job of the sweep sees it.

        Raises:
            ValueError: for a value that cannot work.
        """
        if isinstance(config, DictConfig):
            config = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        shared = comparison_from(config, kind)
        settings = dict(config.get("method_kwargs") or {})
        if kind == "ablation":
            name = config.get("base_method")
            if name is not None:
                check_method(name, "base_method")
            for key in ("normalization", "centering"):
                if settings.get(key) is None:
                    raise ValueError(f"method_kwargs.{key}=null must be set, or swept by hydra")
            candidate = Candidate(name, None, settings)
        else:
            candidate = Candidate.parse(str(config.get("candidate")), "candidate")
        seed = config.get("seed")
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be a whole number, or swept by hydra")
        lr = config.get("lr")
        if lr is not None and not float(lr) > 0:
            raise ValueError(f"lr={lr} must be greater than 0")
        return cls(shared, candidate, seed, None if lr is None else float(lr))


def comparison_from(config: Mapping[str, Any], kind: str) -> ComparisonSettings:
    """The shared part of a config, checked.

    Raises:
        ValueError: for a value that cannot work.
    """
    data = config.get("data") or {}
    known = {f.name for f in fields(ComparisonSettings)} - {
        "kind",
        "train_path",
        "val_path",
        "demo",
    }
    values = {key: config[key] for key in known if key in config}
    settings = ComparisonSettings(kind=kind, **values, **data)
    settings.check()
    return settings
