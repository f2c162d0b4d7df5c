"""Rows and chart of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinovmf_plugin.report.numbers import percent
from dinovmf_plugin.report.paper import PaperRow
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import axes_figure

__all__ = ["finetune_chart", "finetune_rows"]


def finetune_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> Table:
    """Best validation epoch and its learning rate."""
    rows: list[list[object]] = []
    for name, result in ours.items():
        best = result["best"]
        scores = (percent(best[metric]) for metric in ("top1", "mean_per_class"))
        rows.append([name, *scores, f"{best['lr']:g}", best["epoch"]])
    dataset = next(iter(ours.values()))["settings"]["dataset"] or "imagenet"
    for row in paper:
        if dataset in row.finetune:
            # Tables 14 and 15 give the mean per class for Aircraft only
            value = percent(row.finetune[dataset])
            pair = (None, value) if dataset == "aircraft" else (value, None)
            data = "ImageNet" if dataset == "imagenet" else dataset
            rows.append([row.label(data), *pair, None, None])
    return Table(["fine-tuned (%)", "best on val, top-1", "mean per class", "lr", "epoch"], rows)


def finetune_chart(ours: Mapping[str, Any]) -> Figure:
    """Validation accuracy of every learning rate by epoch."""
    figure, axes = axes_figure("epoch", "top-1 accuracy (%)")
    for result in ours.values():
        for run in result["runs"]:
            scores = [(entry["epoch"], entry["top1"]) for entry in run["epochs"]]
            axes.plot(*zip(*scores, strict=True), "o-", markersize=3, label=f"lr {run['lr']:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure
