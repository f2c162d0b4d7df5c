"""Pages of docs/: generated ones are current, links hold in the repository, figures come from the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dinovmf_plugin.recipes import list_recipes, recipe_reference

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md"])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def _figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "site" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _slug(heading: str) -> str:
    """Anchor of a heading, as GitHub and Python-Markdown agree on for plain words."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _slugs(path: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub("-+", "-", _slug(heading)) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links__exist_in_the_repository(path):
    wrong = []
    for link in _LINK.findall(_CODE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else (path.parent / name).resolve()
        generated = target.name == "api.md"  # its anchors are made of docstrings
        if not target.exists() or (anchor and not generated and anchor not in _slugs(target)):
            wrong.append(link)
    assert not wrong


def test_site__has_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert "first_steps.md" in nav  # made of the notebook
    assert nav >= {page.name for page in (ROOT / "docs").glob("*.md")}


def test_recipes__are_current():
    names = ["cifar/dino", "custom/dino_vmf", "imagenet/msn_vitb16"]
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    assert set(recipe_reference(names).splitlines()) <= set(written), "make docs/recipes.md again"
    rows = {line.split("`")[1] for line in written if line.startswith("| `")}
    assert rows == set(list_recipes())


@pytest.mark.slow
def test_recipes__are_current_all():
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe_reference() == written, "run dinovmf recipes --markdown > docs/recipes.md"


def test_figures__are_those_of_the_page(tmp_path):
    figures = _figures()
    figures.draw(tmp_path)
    page = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"pictures/(\w+)\.svg", page))
    assert shown == {path.stem for path in tmp_path.iterdir()} == set(figures.FIGURES)
    for path in tmp_path.iterdir():
        assert (ROOT / "docs" / "pictures" / path.name).is_file()
        assert "<svg" in path.read_text(encoding="utf-8")[:600]


def test_figures__say_what_the_page_says():
    figures = _figures()
    kappa = torch.logspace(0, 3, 60, dtype=torch.float64)
    worst = [np.abs(figures.expansion_error(kappa, order)).max() for order in (0, 1, 2)]
    assert worst[0] < 1e-3
    assert worst[1] < 1e-5
    assert worst[2] < 1e-7

    score = figures.component_score(0.3, torch.arange(0.0, 200.0, dtype=torch.float64))
    best = float(score.argmax())
    length = figures.mean_resultant_length(torch.tensor(best), figures.DIM)
    assert abs(float(length) - 0.3) < 0.003

    least = {
        name: float(figures.centered_usage(name)[-1]) for name in ("none", "logit", "probability")
    }
    assert least["probability"] > least["none"] > least["logit"]


def test_coming__code_runs():
    page = (ROOT / "docs" / "coming.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert 7 < names["loss"].item() < 10  # about log 4096


def test_hooks__move_links():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("fontTools")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    sys.modules["hooks"] = hooks
    spec.loader.exec_module(hooks)
    move = hooks.site_links
    assert move("[a](docs/em.md#b)", "README.md", "index.md") == "[a](em.md#b)"
    assert (
        move("[a](../results/)", "docs/performance.md", "performance.md")
        == "[a](results/README.md)"
    )
    assert move("[a](../README.md)", "docs/start.md", "start.md") == "[a](index.md)"
    assert move("[a](https://a.org/b)", "README.md", "index.md") == "[a](https://a.org/b)"
    assert move("[a](first_steps.ipynb)", "docs/start.md", "start.md") == "[a](first_steps.md)"
    page = type("Page", (), {"file": type("File", (), {"src_uri": "a.md"})})
    with pytest.raises(hooks.PluginError, match="network"):
        hooks.on_post_page('<script src="https://cdn.org/x.js"></script>', page)
    assert "<msup>" in hooks.on_page_content('<span class="arithmatex">\\(a^2\\)</span>', page)
