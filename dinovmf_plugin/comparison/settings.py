"""The two kinds of comparison, ablation and list of methods: their own keys and the runs they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, ClassVar

from omegaconf import DictConfig

from dinovmf_plugin import registry
from dinovmf_plugin.comparison.shared import ComparisonSettings, RunSettings
from dinovmf_plugin.core.centering import CenteringName
from dinovmf_plugin.core.prototypes import Normalization
from dinovmf_plugin.recipes import Candidate
from dinovmf_plugin.runs.bounds import AtLeastOne, OneOf, Positive, Weight
from dinovmf_plugin.runs.settings import Doc, Settings, read

__all__ = ["AblationSettings", "CompareSettings", "comparison_from", "run_from"]

_SWEPT = ("normalization", "centering")
_SPREAD = "prototype_spread"  # swept too where spreads are given


@dataclass(frozen=True, kw_only=True)
class AblationSettings(ComparisonSettings):
    """configs/ablation.yaml: Table 1 of the paper."""

    kind: ClassVar[str] = "ablation"
    normalizations: Annotated[Sequence[Normalization], AtLeastOne, Doc("of Table 1")] = (
        "none",
        "l2",
        "vmf",
    )
    centerings: Annotated[Sequence[CenteringName], AtLeastOne, Doc("of Table 1")] = (
        "logit",
        "probability",
    )
    spreads: Annotated[
        Sequence[Weight] | None,
        Doc("third axis: weights of KoLeo-proto (prototype_spread); null: the recipe's"),
    ] = None
    base_method: Annotated[
        Annotated[str, OneOf(registry.method_classes)] | None,
        Doc("the method whose two switches are turned; null: the recipe's"),
    ] = "dino_multicrop"
    method_kwargs: Annotated[
        Mapping[str, Any], Doc("of every run; normalization and centering are set by the sweep")
    ] = field(default_factory=dict)

    def _own(self) -> dict[str, Any]:
        own_spread = self.spreads is None and self.method_kwargs.get(_SPREAD) is not None
        swept = _SWEPT if own_spread else (*_SWEPT, _SPREAD)
        return {key: value for key, value in self.method_kwargs.items() if key not in swept}

    def fixed(self) -> dict[str, Any]:
        """Other method_kwargs than those that the ablation sweeps."""
        return {"base_method": self.base_method, "method_kwargs": self._own()}

    def runs(self) -> list[RunSettings]:
        """Every cell with every seed."""
        spreads: list[dict[str, float]] = (
            [{}] if self.spreads is None else [{_SPREAD: weight} for weight in self.spreads]
        )
        candidates = [
            Candidate(
                self.base_method,
                None,
                {**self._own(), "normalization": n, "centering": c, **spread},
            )
            for n, c, spread in product(self.normalizations, self.centerings, spreads)
        ]
        return [RunSettings(self, c, seed) for c, seed in product(candidates, self.seeds)]

    def job(self) -> RunSettings:
        """The cell that the sweep names."""
        for key in _SWEPT:
            if self.method_kwargs.get(key) is None:
                raise ValueError(f"method_kwargs.{key}=null must be set, or swept by hydra")
        given = {k: v for k, v in self.method_kwargs.items() if k != _SPREAD or v is not None}
        candidate = Candidate(self.base_method, None, given)
        return RunSettings(self, candidate, self._swept_seed())


@dataclass(frozen=True)
class StabilitySettings(Settings):
    """Learning rates that every method is trained with."""

    lrs: Annotated[
        Sequence[Positive],
        Doc("optimizer.lr before scaling by the batch; every method at each of them"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class CompareSettings(ComparisonSettings):
    """configs/compare.yaml: any list of methods."""

    kind: ClassVar[str] = "compare"
    methods: Annotated[
        Sequence[str],
        AtLeastOne,
        Doc("methods or recipes (with a slash), or either with method_kwargs: NAME:key=value"),
    ] = ("dino_multicrop", "dino_vmf")
    stability: StabilitySettings = field(default_factory=StabilitySettings)
    candidate: Annotated[str | None, Doc("set by the sweep: one of methods")] = None
    lr: Annotated[Positive | None, Doc("set by the sweep")] = None

    def check(self) -> None:
        """Refuse methods that there are not, too."""
        super().check()
        for text in self.methods:
            Candidate.parse(text)

    def runs(self) -> list[RunSettings]:
        """Every method at every learning rate with every seed."""
        candidates = [Candidate.parse(text) for text in self.methods]
        lrs: list[float | None] = list(self.stability.lrs) or [None]
        return [
            RunSettings(self, candidate, seed, lr)
            for candidate, lr, seed in product(candidates, lrs, self.seeds)
        ]

    def job(self) -> RunSettings:
        """The method that the sweep names."""
        candidate = Candidate.parse(str(self.candidate), "candidate")
        return RunSettings(self, candidate, self._swept_seed(), self.lr)


KINDS: dict[str, type[ComparisonSettings]] = {
    kind.kind: kind for kind in (AblationSettings, CompareSettings)
}


def comparison_from(config: Mapping[str, Any], kind: str) -> ComparisonSettings:
    """The settings of a comparison, checked.

    Args:
        config: configs/ablation.yaml or configs/compare.yaml, plain or hydra's.
        kind: ``ablation`` or ``compare``.

    Raises:
        ValueError: for a value that cannot work.
    """
    return read(KINDS[kind], config)


def run_from(config: Mapping[str, Any] | DictConfig, kind: str) -> RunSettings:
    """The run of one job of the sweep, from configs/ablation.yaml or configs/compare.yaml as it sees them.

    Raises:
        ValueError: for a value that cannot work.
    """
    return comparison_from(config, kind).job()
