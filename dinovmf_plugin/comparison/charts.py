"""Curves over time and final accuracies of a comparison, in both themes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.report.learning import learning_chart
from dinovmf_plugin.report.theme import themed
from dinovmf_plugin.training.alarms import LEAST_SHARE

__all__ = ["curve_charts", "learning_of_groups", "seeds_chart", "stability_chart", "void_figure"]

Themes = dict[str, bytes]
_LINES = ("-", "--", ":")


def _chart(xlabel: str, ylabel: str, draw: Callable[[Axes], None]) -> Themes:
    def make() -> Figure:
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        draw(axes)
        if xlabel == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
        return figure

    return themed(make)


def _style(index: int) -> dict[str, Any]:
    """Six colors, then other dashes."""
    colors = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return {"color": colors[index % len(colors)], "linestyle": _LINES[index // len(colors) % 3]}


Series = Callable[[dict[str, Any]], list[tuple[float, float]]]


def _curves(groups: Sequence[Group], series: Series) -> Callable[[Axes], None] | None:
    if not any(series(run) for group in groups for run in group.runs):
        return None

    def draw(axes: Axes) -> None:
        for index, group in enumerate(groups):
            label: str | None = group.name
            for run in group.runs:
                points = series(run)
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=4,
                              alpha=0.8, linewidth=1.3, **_style(index))  # fmt: skip
                    label = None

    return draw


def _of_curve(key: str) -> Series:
    return lambda run: [(r["epoch"], r[key]) for r in run["curve"] if r.get(key) is not None]


def _of_monitor(key: str, factor: float = 1) -> Series:
    return lambda run: [
        (r["epoch"] + 1, factor * r[key]) for r in run["monitor"]["epoch"] if r.get(key) is not None
    ]


def curve_charts(groups: Sequence[Group], k: int) -> list[tuple[Themes, str]]:
    """What the runs recorded, one line per seed; charts without data are left out."""
    wanted = (
        (f"kNN top-1 (%), k = {k}", "kNN of the teacher over time", _of_curve("top1")),
        ("loss", "Training loss", _of_curve("loss")),
        ("median κ", "Concentration of the teacher's components", _of_monitor("kappa_median")),
        ("unique prototypes", "Prototypes without duplicates", _of_monitor("unique_prototypes")),
        (
            "cosine with the mean of y",
            "Median cosine of the prototypes with the data: -1 in a void set",
            _of_monitor("data_cosine_median"),
        ),
    )
    charts = []
    for ylabel, caption, series in wanted:
        draw = _curves(groups, series)
        if draw is not None:
            charts.append((_chart("epoch", ylabel, draw), f"{caption}; one line per seed"))
    return charts


def void_figure(groups: Sequence[Group]) -> Figure:
    """A void set over time: prototypes that win, copies of one another, their cosine with the data.

    One line per run; epochs below.

    Raises:
        ValueError: if no run has recorded it (comparisons of methods without prototypes).
    """
    wanted = (
        ("prototypes that win an image (%)", "win_share", 100),
        ("in the largest set of copies (%)", "largest_duplicate_share", 100),
        ("median cosine with the mean of y", "data_cosine_median", 1),
    )
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(wanted))
    for (label, key, factor), axes in zip(wanted, panels, strict=True):
        draw = _curves(groups, _of_monitor(key, factor))
        if draw is None:
            raise ValueError(f"no run has recorded {key}: there is no void set to draw")
        draw(axes)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_ylim(-3, 103)
    panels[2].set_ylim(-1.03, 0.2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def learning_of_groups(groups: Sequence[Group]) -> Themes | None:
    """Information over the steps, the mean of each group's seeds; None if no run measured it."""
    names = ("target_information_share", "student_information_share")
    curves: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        by_step: dict[int, list[dict[str, Any]]] = {}
        for run in group.runs:
            for record in run["monitor"]["step"]:
                if record.get(names[0]) is not None:
                    by_step.setdefault(record["step"], []).append(record)
        curves[group.name] = [
            {"step": step, **{n: fmean(r[n] for r in found if r[n] is not None) for n in names}}
            for step, found in sorted(by_step.items())
            if all(any(r[n] is not None for r in found) for n in names)
        ]
    return learning_chart(curves, LEAST_SHARE)


def seeds_chart(groups: Sequence[Group], metric: str, ylabel: str) -> Themes:
    """Every seed as a dot, the mean as a bar: differences beside their spread."""

    def draw(axes: Axes) -> None:
        for index, group in enumerate(groups):
            values = group.values(metric)
            color = _style(index)["color"]
            axes.plot([index] * len(values), values, "o", color=color, alpha=0.7)
            if values:
                mean = sum(values) / len(values)
                axes.plot([index - 0.25, index + 0.25], [mean, mean], color=color, linewidth=2.5)
        names = [group.name for group in groups]
        axes.set_xticks(range(len(groups)), names, rotation=30, ha="right", fontsize=8)

    return _chart("", ylabel, draw)


def stability_chart(groups: Sequence[Group], metric: str, ylabel: str) -> Themes:
    """Accuracy over the learning rate; broken runs are crosses, those without a value at the bottom."""

    def draw(axes: Axes) -> None:
        every = [value for group in groups for value in group.values(metric)]
        bottom = min(every, default=0.0) - 2
        for index, label in enumerate(dict.fromkeys(group.label for group in groups)):
            mine = sorted((g for g in groups if g.label == label), key=lambda g: g.lr or 0)
            means = [(g.lr, sum(v) / len(v)) for g in mine if (v := g.values(metric))]
            style = _style(index)
            if means:
                axes.plot(*zip(*means, strict=True), label=label, **style)
            for group in mine:
                for run in group.runs:
                    whole = run["outcome"] == "trains"
                    value = run["metrics"].get(metric, bottom)
                    marker = "o" if whole else "X"
                    axes.plot([group.lr or 0.0], [value], marker, color=style["color"], alpha=0.7)
        axes.set_xscale("log")

    return _chart("learning rate before scaling (X: broken run)", ylabel, draw)
