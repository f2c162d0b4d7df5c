"""What gets installed: every package is listed, every yaml file is package data, importing stays light."""

from __future__ import annotations

import configparser
import fnmatch
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setup_cfg__lists_every_package():
    listed = set(_setup()["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dinovmf_plugin").rglob("__init__.py")
    }
    extra = {
        "dinovmf_plugin.configs",
        "dinovmf_plugin.scripts",
        "hydra_plugins",
        "hydra_plugins.dinovmf",
    }
    assert listed == found | extra


def test_setup_cfg__ships_every_yaml():
    patterns = (
        _setup()["options.package_data"]["dinovmf_plugin.configs"].replace(" ", "").split(",")
    )
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = str(path.relative_to(ROOT / "configs"))
        depth = name.count("/")
        assert any(p.count("/") == depth and fnmatch.fnmatch(name, p) for p in patterns), name


def test_namespace_package__has_no_init():
    # hydra finds plugins in the namespace package hydra_plugins; an __init__.py would hide all others
    assert not (ROOT / "hydra_plugins/__init__.py").exists()


def test_import__needs_neither_torch_nor_solo():
    code = "import sys, dinovmf_plugin; print([m for m in ('torch', 'solo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_wheel__contains_configs_scripts_and_hydra_plugin(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "dinovmf_plugin/py.typed",
        "dinovmf_plugin/configs/imagenet/dino_vmf_vitb16.yaml",
        "dinovmf_plugin/configs/demo.yaml",
        "dinovmf_plugin/scripts/main_pretrain.py",
        "hydra_plugins/dinovmf/__init__.py",
    ):
        assert name in names
    assert "hydra_plugins/__init__.py" not in names


@pytest.mark.parametrize(
    ("methods", "override"),
    [
        ("", []),
        ("ibot_vmf msn", ["methods=[dino_multicrop,dino_vmf,ibot_vmf,msn]"]),
        (" dino_vmf  ibot ", ["methods=[dino_multicrop,dino_vmf,ibot]"]),
    ],
)
def test_make_demo__adds_methods(methods, override):
    command = ["make", "-n", "-o", "install", "demo", "OUT=out", f"METHODS={methods}"]
    # not as a part of the make that may have started these tests
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[1:] == ["scripts/demo.py", "output_dir=out", *override]
