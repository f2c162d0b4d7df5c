"""Rows and chart of the kNN evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dinovmf_plugin.report.numbers import percent
from dinovmf_plugin.report.paper import PaperRow
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import axes_figure

__all__ = ["knn_chart", "knn_rows"]


def _ks(result: Mapping[str, Any]) -> list[str]:
    return [key for key in result if key.startswith("k") and key[1:].isdigit()]


def knn_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> Table:
    """Top-1 and top-5 by k, the paper's best k beside them."""
    ks = _ks(next(iter(ours.values())))
    rows: list[list[object]] = []
    for name, result in ours.items():
        rows.append([name, *(percent(result[k]["top1"]) for k in ks)])
        rows.append([f"{name}, top-5", *(percent(result[k]["top5"]) for k in ks)])
    best = [None if k != "k10" else 1 for k in ks]
    for row in paper:
        if row.knn is not None:
            rows.append([row.label(), *(percent(row.knn) if b else None for b in best)])
    return Table(["kNN top-1 (%)", *(f"k = {k[1:]}" for k in ks)], rows)


def knn_chart(ours: Mapping[str, Any]) -> Figure:
    """Accuracy against k."""
    figure, axes = axes_figure("k (neighbors)", "top-1 accuracy (%)")
    for name, result in ours.items():
        ks = _ks(result)
        axes.plot([int(k[1:]) for k in ks], [result[k]["top1"] for k in ks], "o-", label=name)
    axes.set_xscale("log")
    ticks = [int(k[1:]) for k in _ks(next(iter(ours.values())))]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure
