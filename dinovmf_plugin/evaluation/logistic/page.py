"""Rows, details and charts of the logistic regressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dinovmf_plugin.report.numbers import percent, spread
from dinovmf_plugin.report.paper import TABLE_5, PaperRow
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import axes_figure

__all__ = ["few_shot_chart", "few_shot_rows", "transfer_chart", "transfer_details", "transfer_rows"]


def few_shot_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> Table:
    """Mean and spread over the splits of every setting."""
    settings = list(next(iter(ours.values()))["top1"])
    rows: list[list[object]] = []
    for name, result in ours.items():
        entries = (result["top1"][s] for s in settings)
        rows.append([name, *(spread(entry["mean"], entry["std"]) for entry in entries)])
    for row in paper:
        if any(s in row.few_shot for s in settings):
            values = ((row.few_shot.get(s), row.few_shot_std.get(s)) for s in settings)
            rows.append([row.label(), *(spread(*pair) for pair in values)])
    return Table(["few-shot top-1 (%)", *settings], rows)


def transfer_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> Table:
    """Both metrics of every data set and their averages."""
    names = list(next(iter(ours.values()))["datasets"])
    rows: list[list[object]] = []
    for name, result in ours.items():
        for metric, words in (("top1", "top-1"), ("mean_per_class", "mean per class")):
            values = [percent(result["datasets"][d][metric]) for d in names]
            rows.append([f"{name}, {words}", *values, percent(result["average"][metric])])
    for row in paper:
        if any(d in row.transfer for d in names):
            values = [percent(row.transfer.get(d)) for d in names]
            average = percent(row.transfer["average"]) if set(names) == set(TABLE_5) else None
            rows.append([row.label("Table 5"), *values, average])
    return Table(["linear transfer (%)", *names, "average"], rows)


def transfer_details(ours: Mapping[str, Any]) -> Table:
    """What cross-validation chose for every data set."""
    header = ["linear transfer", "data set", "classes", "training images", "test images"]
    header += ["chosen l2 strength", "cross-validated top-1 (%)", "fits cut short"]
    rows: list[list[object]] = []
    for name, result in ours.items():
        for dataset, found in result["datasets"].items():
            row = [found[key] for key in ("classes", "train_images", "test_images")]
            cv = found["cv"]["top1"][found["cv"]["weight_decay"].index(found["weight_decay"])]
            row += [f"{found['weight_decay']:.3g}", percent(cv), found["unfinished_fits"]]
            rows.append([name, dataset, *row])
    return Table(header, rows)


def few_shot_chart(ours: Mapping[str, Any]) -> Figure:
    """Mean and spread over the splits as bars."""
    figure, axes = axes_figure("labeled images", "top-1 accuracy (%)")
    for i, (name, result) in enumerate(ours.items()):
        entries = list(result["top1"].values())
        means, spread = ([entry[key] for entry in entries] for key in ("mean", "std"))
        places = [place + 0.1 * (i - (len(ours) - 1) / 2) for place in range(len(entries))]
        axes.errorbar(places, means, spread, fmt="o", capsize=4, label=name)
    settings = list(next(iter(ours.values()))["top1"])
    axes.set_xticks(range(len(settings)), settings)
    axes.legend()
    return figure


def transfer_chart(ours: Mapping[str, Any]) -> Figure:
    """Cross-validated accuracy against the l2 strength, for the network itself."""
    figure, axes = axes_figure("l2 strength", "cross-validated top-1 (%)")
    first = next(iter(ours.values()))
    for name, result in first["datasets"].items():
        axes.plot(result["cv"]["weight_decay"], result["cv"]["top1"], label=name)
    axes.set_xscale("log")
    axes.legend(ncols=2, fontsize="small")
    return figure
