"""What ``scripts/demo.py`` can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from dinovmf_plugin import registry
from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.evaluation.knn.settings import Neighbors, VoteTemperature
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Fraction, OneOf, Path, Seed
from dinovmf_plugin.runs.settings import Doc, Settings

__all__ = ["DemoSettings"]

MethodName = Annotated[str, OneOf(registry.method_classes)]


@dataclass(frozen=True)
class DemoKnn(Settings):
    """The kNN evaluation of the demo."""

    ks: Neighbors = (10, 20, 100, 200)
    k: Annotated[Count, Doc("of the curve and the headline: one of ks")] = 10
    temperature: VoteTemperature = 0.07
    every: Annotated[Count, Doc("epochs between two points of the curve")] = 2

    def check(self) -> None:
        """Refuse a headline that is not evaluated."""
        if self.k not in self.ks:
            raise ValueError(f"k={self.k} must be one of ks={list(self.ks)}")


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Everything that ``scripts/demo.py`` can be told."""

    output_dir: Annotated[
        Path, Doc("a new folder, or that of a demo of the same settings, which goes on")
    ] = "demo"
    dataset: Annotated[
        str, OneOf(demo_data.DATASETS), Doc("pictures installed by pip, never downloaded here")
    ] = "photographs"
    fraction: Annotated[Fraction, Doc("share of the data set's pictures to use")] = 1.0
    methods: Annotated[Sequence[MethodName], AtLeastOne, Doc("methods to train")] = (
        "dino_multicrop",
        "dino_vmf",
    )
    processes: Annotated[
        Count | None, Doc("trainings at a time; null: one a method, at most one a core")
    ] = None
    seed: Annotated[Seed, Doc("of every training")] = 0
    overrides: Annotated[
        Sequence[str], Doc("of demo_recipe, in hydra's syntax: ['max_epochs=2']")
    ] = ()
    method_settings: Annotated[
        Mapping[str, Mapping[str, Any]],
        Doc("method_kwargs by method, where the recipe's sharp teacher means another key"),
    ] = field(default_factory=dict)
    knn: DemoKnn = field(default_factory=DemoKnn)
