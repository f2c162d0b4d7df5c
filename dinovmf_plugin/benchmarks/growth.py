"""How time and memory grow: the loss with prototypes and batch, kNN with its bank; a figure with slopes.

A slope is that of a straight line through the points on logarithmic axes: 1 is proportional, 0 constant.
The loss is that of ``benchmark.py loss`` (one step of last layer, targets and loss), kNN that of
``benchmark.py knn``; lightly and faiss take part where they are installed.

    python scripts/benchmark.py growth output=results/benchmark_growth.json figure=results/growth.svg
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinovmf_plugin.benchmarks import knn, loss
from dinovmf_plugin.benchmarks.harness import (
    check_choice,
    machine,
    parse_arguments,
    write_report,
)

__all__ = ["DEFAULTS", "draw", "main", "slope"]

DEFAULTS: dict[str, Any] = {
    "prototypes": "1024,4096,16384,65536,262144",  # of the loss, at the first batch
    "batches": "16,64,256",  # images, at the middle number of prototypes
    "banks": "1000,10000,100000",  # rows of kNN, 384 dimensions; empty: no kNN
    "precision": "float32",  # of the loss: float32 | bf16
    "device": "cpu",  # of the loss: cpu | cuda
    "repeats": 3,
    "memory": 1,  # 0: times only
    "figure": "",  # SVG, PNG or PDF file; drawn only if given, never over an existing one
    "output": "",  # JSON file; written only if given, never over an existing one
}
Curves = dict[str, dict[str, dict[int, float]]]  # title -> candidate -> size -> value


def slope(points: dict[int, float]) -> float:
    """Exponent of the power law through points (size -> value).

    Example:
        >>> round(slope({10: 3.0, 100: 300.0, 1000: 30000.0}), 6)
        2.0
    """
    sizes, values = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(sizes, values, 1)[0])


def _numbers(settings: dict[str, Any], key: str) -> list[int]:
    parts = [part for part in settings[key].split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) == 1:
        raise ValueError(f"{key}={settings[key]!r} must be at least two sizes, such as 1000,10000")
    return [int(part) for part in parts]


def _loss_point(settings: dict[str, Any], names: list[str], prototypes: int, batch: int) -> Any:
    """Median seconds and peak MB of one step by candidate."""
    options = {
        **loss.DEFAULTS,
        "prototypes": prototypes,
        "device": settings["device"],
        "repeats": settings["repeats"],
    }
    half = settings["precision"] == "bf16"
    seconds = loss.measure(names, options, batch, half)["median"]
    peaks = {
        name: loss.fresh_peak(name, options, batch, half) for name in names if settings["memory"]
    }
    return seconds, peaks


def _measure(settings: dict[str, Any]) -> Curves:
    curves: Curves = {}

    def add(title: str, values: dict[str, float], size: int) -> None:
        for name, value in values.items():
            curves.setdefault(title, {}).setdefault(name, {})[size] = max(value, 1e-9)
        print(f"  {title}, {size}: " + ", ".join(f"{n} {v:.4g}" for n, v in values.items()))

    names = ["none", "vmf", *(["lightly"] if importlib.util.find_spec("lightly") else [])]
    ks, batches, banks = (_numbers(settings, key) for key in ("prototypes", "batches", "banks"))
    middle = ks[len(ks) // 2]
    plans = [("prototypes", k, k, batches[0]) for k in ks]
    plans += [("images", b, middle, b) for b in batches]
    for what, size, prototypes, batch in plans:
        seconds, peaks = _loss_point(settings, names, prototypes, batch)
        add(f"seconds of a loss step against {what}", seconds, size)
        if peaks:
            add(f"peak MB of a loss step against {what}", peaks, size)
    searchers = ["ours", *(["faiss"] if importlib.util.find_spec("faiss") else [])]
    for rows in banks:
        options = {**knn.DEFAULTS, "repeats": settings["repeats"]}
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
        argv: ``key=value`` arguments, keys as in ``DEFAULTS``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output or the figure exists already.
    """
    settings = parse_arguments(argv, DEFAULTS)
    check_choice(settings, "precision", ("float32", "bf16"))
    check_choice(settings, "device", ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    for key in ("prototypes", "batches"):
        if not _numbers(settings, key):
            raise ValueError(f"{key}= must be at least two sizes, such as 1000,10000")
    _numbers(settings, "banks")
    figure = settings["figure"]
    if figure and Path(figure).exists():
        raise FileExistsError(f"figure={figure} exists: remove it or choose another name")
    if figure and Path(figure).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"figure={figure!r} must end in .svg, .png or .pdf")
    about = {
        **machine(),
        "gpu": torch.cuda.get_device_name() if settings["device"] == "cuda" else None,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    curves = _measure(settings)
    slopes = {
        title: {name: slope(points) for name, points in candidates.items()}
        for title, candidates in curves.items()
    }
    for title, candidates in slopes.items():
        print(f"{title}: " + ", ".join(f"{n} slope {s:.2f}" for n, s in candidates.items()))
    if figure:
        draw(curves, Path(figure))
    report = {
        "machine": about,
        "settings": settings,
        "results": {"curves": curves, "slopes": slopes},
    }
    write_report("growth", argv, report, settings["output"])


if __name__ == "__main__":
    main(sys.argv[1:])
