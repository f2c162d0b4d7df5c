"""How time and memory grow: the loss with prototypes and batch, kNN with its bank; a figure with slopes.

A slope is that of a straight line through the points on logarithmic axes: 1 is proportional, 0 constant.
The loss is that of ``benchmark.py loss`` (one step of last layer, targets and loss), kNN that of
``benchmark.py knn``; lightly and faiss take part where they are installed.

    python scripts/benchmark.py growth output=results/benchmark_growth.json figure=results/growth.svg
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinovmf_plugin.benchmarks import knn, loss
from dinovmf_plugin.benchmarks.harness import (
    announce,
    graphics_card,
    installed_candidates,
    machine,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.settings import GrowthSettings, KnnSettings, LossSettings

__all__ = ["draw", "main", "slope"]

Curves = dict[str, dict[str, dict[int, float]]]  # title -> candidate -> size -> value


def slope(points: dict[int, float]) -> float:
    """Exponent of the power law through points (size -> value).

    Example:
        >>> round(slope({10: 3.0, 100: 300.0, 1000: 30000.0}), 6)
        2.0
    """
    sizes, values = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(sizes, values, 1)[0])


def _loss_point(settings: GrowthSettings, names: list[str], prototypes: int, batch: int) -> Any:
    """Median seconds and peak MB of one step by candidate."""
    options = replace(
        LossSettings(), prototypes=prototypes, device=settings.device, repeats=settings.repeats
    )
    half = settings.precision == "bf16"
    seconds = loss.measure(names, options, batch, half)["median"]
    peaks = {name: loss.fresh_peak(name, options, batch, half) for name in names if settings.memory}
    return seconds, peaks


def _measure(settings: GrowthSettings) -> Curves:
    curves: Curves = {}

    def add(title: str, values: dict[str, float], size: int) -> None:
        for name, value in values.items():
            curves.setdefault(title, {}).setdefault(name, {})[size] = max(value, 1e-9)
        print(f"  {title}, {size}: " + ", ".join(f"{n} {v:.4g}" for n, v in values.items()))

    names = installed_candidates(["none", "vmf", "lightly"], {"lightly": "lightly"})
    ks, batches = settings.prototypes, settings.batches
    middle = ks[len(ks) // 2]
    plans = [("prototypes", k, k, batches[0]) for k in ks]
    plans += [("images", b, middle, b) for b in batches]
    for what, size, prototypes, batch in plans:
        seconds, peaks = _loss_point(settings, names, prototypes, batch)
        add(f"seconds of a loss step against {what}", seconds, size)
        if peaks:
            add(f"peak MB of a loss step against {what}", peaks, size)
    searchers = installed_candidates(["ours", "faiss"], {"faiss": "faiss-cpu"})
    options = KnnSettings(repeats=settings.repeats)
    for rows in settings.banks:
        found = knn.measure(rows, 384, searchers, options)["median"]
        add("seconds of kNN against rows of the bank", found, rows)
    return curves


def draw(curves: Curves, path: Path) -> None:
    """One panel per title, logarithmic axes, the slope in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, candidates) in zip(panels, curves.items(), strict=True):
        for name, points in candidates.items():
            label = f"{name}, slope {slope(points):.2f}"
            panel.loglog(list(points), list(points.values()), marker="o", label=label)
        value, size = title.split(" against ")
        panel.set(title=value, xlabel=size)
        panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Print sizes, values and slopes; draw and write them if asked.

    Args:
        argv: ``key=value`` arguments, keys of ``GrowthSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output or the figure exists already.
    """
    settings = read_settings(GrowthSettings, argv)
    about = {
        **machine(),
        "gpu": graphics_card("device", settings.device),
    }
    announce(about)
    curves = _measure(settings)
    slopes = {
        title: {name: slope(points) for name, points in candidates.items()}
        for title, candidates in curves.items()
    }
    for title, candidates in slopes.items():
        print(f"{title}: " + ", ".join(f"{n} slope {s:.2f}" for n, s in candidates.items()))
    if settings.figure:
        draw(curves, Path(settings.figure))
    found = {"curves": curves, "slopes": slopes}
    write_report("growth", argv, settings, about, {"results": found})
