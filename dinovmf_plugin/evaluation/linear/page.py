"""Rows, details and chart of the linear probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dinovmf_plugin.report.numbers import percent
from dinovmf_plugin.report.paper import PaperRow
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import axes_figure

__all__ = ["linear_chart", "linear_details", "linear_rows"]


def _feature_name(feature: str) -> str:
    """With the paper's letter, where it has one."""
    return {"cls": "[C] cls", "dino": "[D] dino"}.get(feature, feature)


def linear_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> Table:
    """Best validation accuracy of every feature."""
    features = list(dict.fromkeys(f for result in ours.values() for f in result["features"]))
    rows: list[list[object]] = []
    for name, result in ours.items():
        found = (result["features"].get(feature) for feature in features)
        rows.append([name, *(percent(f["best"]["top1"]) if f else None for f in found)])
    for row in paper:
        known = {"cls": row.cls, "dino": row.dino}
        rows.append([row.label(), *(percent(known.get(feature)) for feature in features)])
    return Table(["linear top-1 (%), best on val", *map(_feature_name, features)], rows)


def linear_details(ours: Mapping[str, Any]) -> Table:
    """What was chosen, and what the last epoch gives."""
    header = ["linear top-1 (%)", "feature", "best on val", "its lr", "its epoch"]
    header += ["last, official lr", "last, best lr"]
    every = [report for result in ours.values() for report in result["features"].values()]
    held_out = any("chosen" in report for report in every)
    rows: list[list[object]] = []
    for name, result in ours.items():
        for feature, report in result["features"].items():
            best, last = report["best"], max(entry["top1"] for entry in report["last"])
            official = report.get("protocol_lr", {}).get("last", {}).get("top1")
            row: list[object] = [name, f"{_feature_name(feature)}, {report['dim']}"]
            row += [percent(best["top1"]), f"{best['lr']:g}", best["epoch"]]
            row += [percent(official), percent(last)]
            if held_out:
                row.append(percent(report.get("chosen", {}).get("top1")))
            rows.append(row)
    return Table([*header, "chosen on held-out"] if held_out else header, rows)


def linear_chart(ours: Mapping[str, Any]) -> Figure:
    """Last epoch of every learning rate of the grid."""
    figure, axes = axes_figure(
        "learning rate (before batch / 256)", "top-1 after the last epoch (%)"
    )
    for name, result in ours.items():
        for feature, report in result["features"].items():
            lrs = [entry["lr"] for entry in report["last"]]
            axes.plot(
                lrs,
                [e["top1"] for e in report["last"]],
                "o-",
                label=f"{name} {_feature_name(feature)}",
            )
    axes.set_xscale("log")
    axes.legend()
    return figure
