"""The demo has a recipe that every method accepts."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_module

from dinovmf_plugin import registry
from dinovmf_plugin.demo import run
from dinovmf_plugin.demo.settings import DemoSettings
from dinovmf_plugin.runs.settings import read
from dinovmf_plugin.training.config import parse_cfg


def _demo(*overrides: str) -> Any:
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return compose("demo", overrides=list(overrides))


@pytest.mark.parametrize("method", sorted(registry.method_classes()))
def test_recipe__every_method__is_accepted(method, tmp_path, build):
    (tmp_path / "train" / "class").mkdir(parents=True)
    settings = read(DemoSettings, _demo(f"output_dir={tmp_path}"))
    recipe = parse_cfg(run._recipe(settings, method, tmp_path))
    assert recipe.method == method
    own = settings.method_settings.get(method, {})
    module = build(recipe)
    assert {key: getattr(module.settings, key) for key in own} == own
