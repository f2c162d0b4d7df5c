"""Any hydra app of the environment finds the plugin's configs, and pays next to nothing for it."""

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

from dinovmf_plugin import host

_APP = """
import json, sys
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

def found(name):
    try:
        return compose(name).get("method")
    except MissingConfigException:
        return None

with initialize_config_dir(sys.argv[1], version_base="1.2"):
    search_path = GlobalHydra.instance().config_loader().get_search_path().get_path()
    names = ["imagenet/dino_vmf_vits16", "imagenet/dino_vits16"]
    print(json.dumps({
        "providers": [entry.provider for entry in search_path],
        "methods": {name: found(name) for name in names},
        "heavy": [m for m in ("torch", "solo", "lightning", "dinovmf_plugin.registry") if m in sys.modules],
    }))
"""


def _run(folder: Path, **environment: str) -> dict[str, Any]:
    path = os.pathsep.join(p for p in sys.path if p)
    out = subprocess.run(
        [sys.executable, "-c", _APP, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_discovery__configs_found_without_importing_torch(tmp_path):
    result = _run(tmp_path)
    assert "dinovmf_plugin" in result["providers"]
    assert result["methods"] == {
        "imagenet/dino_vmf_vits16": "dino_vmf",
        "imagenet/dino_vits16": "dino_multicrop",
    }
    assert result["heavy"] == []


def test_discovery__the_apps_own_config_wins(tmp_path):
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "dino_vits16.yaml").write_text("# @package _global_\nmethod: mine\n")
    result = _run(tmp_path)
    assert result["methods"]["imagenet/dino_vits16"] == "mine"
    assert result["methods"]["imagenet/dino_vmf_vits16"] == "dino_vmf"


def test_discovery__can_be_switched_off(tmp_path):
    result = _run(tmp_path, DINOVMF_PLUGIN_DISABLE="1")
    assert "dinovmf_plugin" not in result["providers"]
    assert set(result["methods"].values()) == {None}


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
