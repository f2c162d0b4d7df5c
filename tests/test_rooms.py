"""The house: a file imports only from floors below its own; lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("core", "data", "report", "_version"),
    ("losses", "host", "mixture", "runs"),
    ("training", "checkpoints"),
    ("methods",),
    ("features",),
    ("registry", "analysis", "embeddings", "evaluation"),
    ("pretraining", "publishing", "recipes", "doctor"),
    ("comparison", "demo", "benchmarks", "api"),
    ("__init__",),
    ("scripts", "commands", "hydra_plugins"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
FOREIGN = {
    "solo": {"host"},
    "lightning": set(FLOOR) - {"core", "losses", "mixture", "report", "_version"},
}


def _files() -> Iterator[tuple[str, Path]]:
    """Room and path of every file of the house."""
    package = ROOT / "dinovmf_plugin"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield "hydra_plugins" if "hydra_plugins" in parts else parts[0], path
    for folder in ("scripts", "hydra_plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str:
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in FLOOR else "__init__"


def _wrong(room: str, source: str) -> Iterator[str]:
    for name in _imports(ast.parse(source)):
        top = name.split(".")[0]
        if top in FOREIGN and room not in FOREIGN[top]:
            yield f"{room} imports {name}"
        target = _room(name)
        if top == "dinovmf_plugin" and target != room and FLOOR[target] >= FLOOR[room]:
            yield f"{room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[target]})"


def test_imports__only_go_down():
    found = [
        f"{path.relative_to(ROOT)}: {sentence}"
        for room, path in _files()
        for sentence in _wrong(room, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_room__has_its_floor():
    assert {room for room, _ in _files()} <= set(FLOOR)


def test_checker__finds_what_is_wrong():
    up = "def f():\n    from dinovmf_plugin.methods import dino"
    assert list(_wrong("core", up)) == [
        "core (floor 1) imports dinovmf_plugin.methods.dino (floor 4)"
    ]
    assert list(_wrong("evaluation", "import dinovmf_plugin.analysis.figures"))
    assert list(_wrong("host", "from dinovmf_plugin import __version__"))
    assert list(_wrong("methods", "import solo.methods"))
    assert list(_wrong("mixture", "from lightning.pytorch import Trainer"))
    assert not list(_wrong("methods", "from dinovmf_plugin import host"))
    assert not list(_wrong("scripts", "from dinovmf_plugin.evaluation.runner import evaluate"))
