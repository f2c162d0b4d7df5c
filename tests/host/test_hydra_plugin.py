"""Any hydra app of the environment finds the plugin's configs at ``dinovmf/``, and notices nothing else."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from dinovmf_plugin import host

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    {path.stem for path in CONFIGS.iterdir() if path.suffix in ("", ".yaml")} - {"__pycache__"}
)
_GROUPS = ("augmentations", "backbone", "data", "evaluation", "method", "optimization", "trainer")
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in _GROUPS
)

# a foreign app: one key per name that the plugin's configs have, as a text, as a group of keys, and as a
# group of config files of its own
_APP = """
import json, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

folder, *names = sys.argv[1:]
results = []
for config, overrides in (
    ("scalars", ["{}=b.csv", "++{}=b.csv", "~{}"]),
    ("nodes", ["{}.path=b.csv", "++{}.path=b.csv", "+{}.other=1", "{}=null"]),
    ("groups", ["{}=other", "{}@renamed=other", "~{}"]),
):
    with initialize_config_dir(f"{folder}/{config}", version_base="1.2"):
        for name in names:
            for override in overrides:
                override = override.format(name)
                try:
                    result = OmegaConf.to_container(compose(config, overrides=[override]))
                except Exception as error:
                    result = str(error)
                results.append((config, override, result))
heavy = ("torch", "solo", "lightning", "numpy", "dinovmf_plugin")
found = {"heavy": [m for m in heavy if m in sys.modules], "modules": sorted(sys.modules)}
print(json.dumps({"results": results, **found}))
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    defaults = "".join(f"  - {name}: one\n" for name in NAMES)
    for config, text in {
        "scalars": "".join(f"{name}: a.csv\n" for name in NAMES),
        "nodes": "".join(f"{name}: {{path: a.csv}}\n" for name in NAMES),
        "groups": f"defaults:\n{defaults}  - _self_\n",
    }.items():
        (folder / config).mkdir()
        (folder / config / f"{config}.yaml").write_text(text)
    for name in NAMES:
        (folder / "groups" / name).mkdir()
        for option in ("one", "other"):
            (folder / "groups" / name / f"{option}.yaml").write_text(f"choice: {option}\n")
    return folder


def _run(folder: Path, **environment: str) -> dict[str, Any]:
    path = os.pathsep.join(p for p in sys.path if p)
    out = subprocess.run(
        [sys.executable, "-c", _APP, str(folder), *NAMES],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_foreign_app__accepts_and_refuses_what_it_does_without_the_plugin(foreign):
    assert {"data", "method", "trainer", "backbone"} <= set(NAMES)
    given = _run(foreign)
    assert given["heavy"] == []
    named = [module for module in given["modules"] if "dinovmf" in module]
    ours = [module for module in named if not module.startswith("__editable__")]  # pip's own
    assert ours == ["hydra_plugins.dinovmf"]  # and, by the last line, nothing for its sake
    results = {(config, override): result for config, override, result in given["results"]}
    assert results["scalars", "data=b.csv"]["data"] == "b.csv"
    assert results["nodes", "method.path=b.csv"]["method"] == {"path": "b.csv"}
    assert results["groups", "trainer=other"]["trainer"] == {"choice": "other"}
    assert given == _run(foreign, DINOVMF_PLUGIN_DISABLE="1")


def _listing(folder: Path, results_filter: ObjectType | None) -> list[str]:
    with initialize_config_dir(str(folder), version_base="1.2"):
        repository = GlobalHydra.instance().config_loader().repository
        return repository.get_group_options("", results_filter)


@pytest.mark.parametrize("kind", [None, ObjectType.GROUP, ObjectType.CONFIG])
def test_search_path__one_name_more(tmp_path, monkeypatch, kind):
    names = set(_listing(tmp_path, kind))
    monkeypatch.setenv("DINOVMF_PLUGIN_DISABLE", "1")
    without = set(_listing(tmp_path, kind))
    assert names - without == ({"dinovmf"} if kind != ObjectType.CONFIG else set())
    assert without <= names


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__is_the_same_below_dinovmf(tmp_path, name):
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        own = OmegaConf.to_container(compose(name), resolve=False)
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        assert OmegaConf.to_container(compose(f"dinovmf/{name}"), resolve=False) == own


def test_groups__are_chosen_below_dinovmf(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - /dinovmf/augmentations: dino_two_crops\n  - _self_\nmethod: dino_vmf\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        choices = ["dinovmf/augmentations=msn", "dinovmf/method=ibot"]
        cfg = compose("dinovmf/custom/dino_vmf", overrides=[*choices, "data.train_path=x"])
        assert (cfg.method, len(cfg.augmentations)) == ("ibot", 2)
        assert cfg.augmentations[0].rrc.interpolation == "bilinear"
        assert len(compose("mine").augmentations) == 2
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        choices = ["augmentations=msn", "method=ibot"]
        assert compose("custom/dino_vmf", overrides=[*choices, "data.train_path=x"]) == cfg


def test_search_path__the_apps_own_config_wins(tmp_path):
    (tmp_path / "dinovmf" / "imagenet").mkdir(parents=True)
    (tmp_path / "dinovmf/imagenet/dino_vits16.yaml").write_text(
        "# @package _global_\nmethod: mine\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        assert compose("dinovmf/imagenet/dino_vits16").method == "mine"
        assert compose("dinovmf/imagenet/dino_vmf_vits16").method == "dino_vmf"


def test_search_path__can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOVMF_PLUGIN_DISABLE", "1")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        assert "dinovmf_plugin" not in [entry.provider for entry in path]


@pytest.fixture
def scan(monkeypatch) -> Any:
    """Import the plugin module as hydra does when an app starts; the methods are not there yet."""
    for name in ("dino_vmf", "dino_multicrop"):
        monkeypatch.delitem(host.METHODS, name, raising=False)

    def run() -> None:
        module = importlib.import_module("hydra_plugins.dinovmf")
        importlib.reload(module)

    return run


def test_scan__solo_loaded__methods_registered(scan):
    assert "solo.methods" in sys.modules
    scan()  # may be the module's first import
    assert {"dino_vmf", "dino_multicrop"} <= set(host.METHODS)


def test_scan__solo_not_loaded__nothing_happens(scan, monkeypatch):
    scan()
    for name in ("dino_vmf", "dino_multicrop"):
        monkeypatch.delitem(host.METHODS, name, raising=False)
    monkeypatch.delitem(sys.modules, "solo.methods")
    scan()
    assert "dino_vmf" not in host.METHODS


def test_scan__disabled__nothing_happens(scan, monkeypatch):
    monkeypatch.setenv("DINOVMF_PLUGIN_DISABLE", "1")
    scan()
    assert "dino_vmf" not in host.METHODS


def test_scan__a_failure__is_a_warning_not_the_end_of_every_hydra_app(scan, monkeypatch, caplog):
    class Foreign:
        pass

    monkeypatch.setitem(host.METHODS, "dino_vmf", Foreign)
    # a hydra app that another test ran in this process may have disabled all loggers
    logger = logging.getLogger("dinovmf_plugin")
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    logger.setLevel(logging.WARNING)
    scan()
    assert "methods were not registered" in caplog.text
    assert "already registered" in caplog.text
