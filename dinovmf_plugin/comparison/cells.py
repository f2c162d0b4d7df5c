"""The six cells of the paper's Table 1 as one picture: components in use and accuracy, every seed a dot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinovmf_plugin.comparison.measures import components_in_use
from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.comparison.tables import metric_name
from dinovmf_plugin.report.theme import THEMES
from dinovmf_plugin.runs.files import replacing

__all__ = ["cells_figure", "cells_of", "check_picture", "draw_picture"]

CENTERINGS = ("logit", "probability")
CELLS = [(n, c) for c in CENTERINGS for n in ("none", "l2", "vmf")]
NAMES = {("none", "logit"): "none\nDINO", ("vmf", "probability"): "vmf\nDINO-vMF"}
METHODS = ("dino_multicrop", "dino_vmf")


def cells_of(groups: Sequence[Group]) -> dict[tuple[str, str], Group]:
    """DINO's cells by normalization and centering; other methods, EM and KoLeo-proto are left out."""
    found: dict[tuple[str, str], Group] = {}
    for group in groups:
        run = group.runs[0]
        kwargs = run["recipe"].get("method_kwargs") or {}
        plain = kwargs.get("prototype_update", "gradient") == "gradient" and not group.spread
        plain = plain and kwargs.get("init_prototypes", "random") == "random"
        if run["method"] in METHODS and group.switches in CELLS and plain and group.lr is None:
            found.setdefault(group.switches, group)
    return found


def _values(group: Group, measure: Callable[[Mapping[str, Any]], Any]) -> list[float]:
    return [value for run in group.whole if (value := measure(run)) is not None]


def cells_figure(groups: Sequence[Group], metric: str) -> Figure:
    """Two panels over the cells: components in use (perplexity) and ``metric`` in percent.

    Args:
        groups: of a comparison or an ablation; only runs that train are drawn.
        metric: such as ``knn_k10``.

    Raises:
        ValueError: if none of the groups is one of the six cells.
    """
    cells = cells_of(groups)
    if not cells:
        names = ", ".join(group.label for group in groups)
        raise ValueError(f"none of the six cells is among the runs: {names}")
    present = [cell for cell in CELLS if cell in cells]
    colors = mpl.rcParams["axes.prop_cycle"].by_key()["color"]

    def draw(axes: Axes, measure: Callable[[Mapping[str, Any]], Any], label: str) -> None:
        named: set[str] = set()
        for at, cell in enumerate(present):
            values = _values(cells[cell], measure)
            color = colors[CENTERINGS.index(cell[1])]
            name = None if cell[1] in named else f"{cell[1]} centering"
            named.add(cell[1])
            axes.plot([at] * len(values), values, "o", color=color, alpha=0.75)
            if values:
                mean = sum(values) / len(values)
                axes.plot([at - 0.3, at + 0.3], [mean, mean], color=color, lw=2.5, label=name)
        axes.set_xticks(range(len(present)), [NAMES.get(cell, cell[0]) for cell in present])
        axes.set_ylabel(label)
        axes.grid(visible=False, axis="x")

    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, components_in_use, "components in use (perplexity)")
    left.set_ylim(bottom=0)
    draw(right, lambda run: run["metrics"].get(metric), f"{metric_name(metric)} (%)")
    runs = [run for group in cells.values() for run in group.whole]
    floors = [r["baselines"]["untrained"][metric] for r in runs if "untrained" in r["baselines"]]
    if floors:
        right.axhline(floors[0], color="0.5", ls="--", lw=1, label="untrained backbone")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def check_picture(option: str, path: str | Path) -> None:
    """Refuse a file that exists, and endings that are no picture's.

    Raises:
        FileExistsError, ValueError: saying so.
    """
    if Path(path).suffix not in (endings := (".svg", ".png", ".pdf")):
        raise ValueError(f"{option} {path} must end in one of {', '.join(endings)}")
    if Path(path).exists():
        raise FileExistsError(f"{option} {path} exists: remove it first, or name another file")


def draw_picture(make: Callable[[], Figure], path: str | Path) -> None:
    """Draw a figure on white, in the format of the path's ending; ``make`` is called in the light theme."""
    with mpl.rc_context(THEMES["light"]):  # type: ignore[arg-type]
        undated = {"Date": None} if Path(path).suffix == ".svg" else None
        with replacing(path) as draft:
            make().savefig(draft, facecolor="white", metadata=undated)
