"""What hydra calls: before a sweep (checks, data), one job, after the sweep (the tables)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.comparison.settings import comparison_from, run_from
from dinovmf_plugin.comparison.shared import ComparisonSettings, RunSettings
from dinovmf_plugin.recipes import sweep_values
from dinovmf_plugin.runs.cli import one_clear_message
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.training.config import parse_cfg

__all__ = ["ComparisonCallback", "planned_runs", "register_resolver", "run_job"]


def register_resolver() -> None:
    """``${sweep_values:${seeds}}`` in the configs: a list becomes the values of a sweep."""
    OmegaConf.register_new_resolver("sweep_values", sweep_values, replace=True)


def planned_runs(config: Mapping[str, Any], kind: str) -> list[RunSettings]:
    """Every run that the lists of a config describe.

    Args:
        config: configs/ablation.yaml or configs/compare.yaml, plain or hydra's.
        kind: ``ablation`` or ``compare``.

    Raises:
        ValueError: for an empty list, an unknown method or anything else that cannot work.
    """
    return comparison_from(config, kind).runs()


def _prepare(config: Mapping[str, Any], kind: str) -> ComparisonSettings:
    """Check everything once, bind the folder to its settings, and make the demo pictures."""
    runs = planned_runs(config, kind)
    shared = runs[0].comparison
    recipes = {run.candidate.label: run.recipe() for run in runs}
    wants_demo = [recipe for recipe in recipes.values() if shared.uses_demo(recipe)]
    # the pictures need their folder to be empty or theirs, the settings theirs: bind first
    open_run_folder(shared.output_dir, {**shared.identity(), **shared.fixed()})
    if wants_demo:
        shared.build_demo()
    for label, recipe in recipes.items():
        _build(label, recipe)
    print(f"{len(runs)} runs: {', '.join(recipes)}", flush=True)
    return shared


def _build(label: str, recipe: DictConfig) -> None:
    """A recipe that cannot be built is refused before the first run trains."""
    from dinovmf_plugin.pretraining import build_method

    try:
        build_method(parse_cfg(recipe.copy()))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def run_job(cfg: DictConfig, kind: str) -> None:
    """One job of the sweep."""
    from dinovmf_plugin.comparison.run import run_one

    run_one(run_from(cfg, kind))


class ComparisonCallback(Callback):
    """Checks before the sweep, collects after it.

    Args:
        kind: ``ablation`` or ``compare``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep that cannot work, with one clear message."""
        one_clear_message(_prepare)(_own_keys(config), self.kind)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the tables of everything that has finished."""
        from dinovmf_plugin.comparison.collect import collect

        one_clear_message(collect)(config.output_dir)


def _own_keys(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
