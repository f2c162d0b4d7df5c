"""What gets installed: every package is listed, every yaml file is package data, importing stays light."""

from __future__ import annotations

import configparser
import email
import fnmatch
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinovmf_plugin.doctor import _USES

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


def _setup_py() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="looked_at")


_RELATIVE = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def test_readme__links_to_files_that_exist():
    links = _RELATIVE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "docs/ARCHITECTURE.md" in links
    assert not [link for link in links if not (ROOT / link.partition("#")[0]).exists()]


def test_long_description__has_no_relative_link():
    make, readme = _setup_py()["long_description"], (ROOT / "README.md").read_text(encoding="utf-8")
    without = make(readme, None)
    assert not _RELATIVE.findall(without)
    assert "![" not in without
    assert "(https://arxiv.org/abs/2405.10939)" in without
    assert "rchitecture (`docs/ARCHITECTURE.md`)" in without
    joined = make(readme, "https://example.org/owner/name/")
    assert not _RELATIVE.findall(joined)
    assert "rchitecture](https://example.org/owner/name/blob/main/docs/ARCHITECTURE.md)" in joined
    text = "![a](docs/x.svg) [b](c.md#d) [e](#f) [g](https://h.org)"
    assert make(text, "https://example.org/o/n") == (
        "![a](https://example.org/o/n/raw/main/docs/x.svg) "
        "[b](https://example.org/o/n/blob/main/c.md#d) [e](#f) [g](https://h.org)"
    )


def test_extras__are_those_of_the_documentation_and_of_the_doctor():
    extras = set(_setup()["options.extras_require"])
    wanted = {"dali", "dali-cuda12", "wandb", "tensorboard", "mlflow", "export", "cluster"}
    assert wanted <= extras
    assert extras <= {*_USES, "dali", "dali-cuda12", "test", "dev", "docs"}


def test_workflow__runs_what_ci_run_runs():
    content = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(content[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` so
    assert content["permissions"] == {"contents": "read"}
    (job,) = content["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [name.partition("@")[0] for name in used] == ["actions/checkout", "actions/setup-python"]
    assert all(re.fullmatch(r".+@v\d+", name) for name in used)
    options = next(step["with"] for step in job["steps"] if "python" in step.get("uses", ""))
    assert options["cache"] == "pip"
    assert f"Programming Language :: Python :: {options['python-version']}" in _classifiers()


def _classifiers() -> list[str]:
    return _setup()["metadata"]["classifiers"].strip().splitlines()


@pytest.mark.slow
def test_environment__has_only_the_conflicts_that_the_makefile_asks_for():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    chosen = re.search(r"^NO_DEPS := (.*)$", text, re.M)
    assert chosen is not None
    names = {word.partition("==")[0] for word in chosen[1].split()}
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = [line for line in done.stdout.splitlines() if " requir" in line]
    assert not [line for line in complaints if line.split()[0] not in names]


def _run(*command: object, **options: Any) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Folder with an sdist of the tracked files, and the wheel that is built from the sdist."""
    source = tmp_path_factory.mktemp("source")
    for name in _run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source)
    return built


@pytest.mark.slow
def test_distributions__pass_the_index_and_hold_everything(distributions):
    files = sorted(distributions.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    told = _run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert told.count("PASSED") == 2
    with zipfile.ZipFile(files[0]) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(about))
    configs = {
        f"dinovmf_plugin/configs/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    package = ROOT / "dinovmf_plugin"
    beside = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.suffix in (".yaml", ".j2", ".typed")
    }
    assert {"dinovmf_plugin/py.typed", "dinovmf_plugin/report/paper.yaml"} <= beside
    assert configs | beside <= names
    assert "dinovmf_plugin/scripts/main_pretrain.py" in names
    assert "hydra_plugins/dinovmf/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "setup"))]
    assert metadata["Author"] == "The dinovmf_plugin contributors"
    assert "Paper, https://arxiv.org/abs/2405.10939" in metadata.get_all("Project-URL")
    assert metadata["License"] == "MIT"
    assert not _RELATIVE.findall(metadata.get_payload())
    with tarfile.open(files[1]) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"tests/test_packaging.py", "docs/ARCHITECTURE.md", ".ci/run", "Makefile"} <= packed


@pytest.mark.slow
def test_wheel__works_from_another_folder(distributions, tmp_path):
    """Installed alone in a fresh environment; everything else comes from this one."""
    (wheel,) = distributions.glob("*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    binary = tmp_path / "env" / "bin"
    options = ("--no-deps", "--no-index", "-q")
    _run(sys.executable, "-m", "pip", "--python", binary / "python", "install", *options, wheel)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    host = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) != ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(host)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import dinovmf_plugin; print(dinovmf_plugin.__file__)"
    place = _run(binary / "python", "-c", code, cwd=elsewhere, env=env).strip()
    assert Path(place).is_relative_to(site)
    told = _run(binary / "dinovmf", "--help", cwd=elsewhere, env=env)
    assert "pretrain" in told
    assert "doctor" in told
    assert "custom/dino_vmf" in _run(binary / "dinovmf", "recipes", cwd=elsewhere, env=env)
    assert not list(elsewhere.iterdir())


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
