"""The page that shows evaluations: our rows, the baselines' and the paper's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinovmf_plugin.report.page import Page, table
from dinovmf_plugin.report.paper import TABLE_5, PaperRow, paper_rows
from dinovmf_plugin.report.theme import axes_figure, themed

__all__ = ["evaluation_page", "text_table"]

Rows = list[list[object]]
Results = Mapping[str, Mapping[str, Any]]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _spread(mean: float | None, std: float | None) -> str | None:
    if mean is None:
        return None
    return f"{mean:.2f}" if not std else f"{mean:.2f} ± {std:.2f}"


def _paper_name(row: PaperRow, data: str = "ImageNet") -> str:
    return f"{row.method} {row.architecture}, paper ({data})"


def _feature_name(feature: str) -> str:
    """With the paper's letter, where it has one."""
    return {"cls": "[C] cls", "dino": "[D] dino"}.get(feature, feature)


def _ks(result: Mapping[str, Any]) -> list[str]:
    return [key for key in result if key.startswith("k") and key[1:].isdigit()]


def _knn_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> tuple[list[str], Rows]:
    ks = _ks(next(iter(ours.values())))
    rows: Rows = []
    for name, result in ours.items():
        rows.append([name, *(_percent(result[k]["top1"]) for k in ks)])
        rows.append([f"{name}, top-5", *(_percent(result[k]["top5"]) for k in ks)])
    best = [None if k != "k10" else 1 for k in ks]
    for row in paper:
        if row.knn is not None:
            rows.append([_paper_name(row), *(_percent(row.knn) if b else None for b in best)])
    return ["kNN top-1 (%)", *(f"k = {k[1:]}" for k in ks)], rows


def _linear_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> tuple[list[str], Rows]:
    features = list(dict.fromkeys(f for result in ours.values() for f in result["features"]))
    rows: Rows = []
    for name, result in ours.items():
        found = (result["features"].get(feature) for feature in features)
        rows.append([name, *(_percent(f["best"]["top1"]) if f else None for f in found)])
    for row in paper:
        known = {"cls": row.cls, "dino": row.dino}
        rows.append([_paper_name(row), *(_percent(known.get(feature)) for feature in features)])
    return ["linear top-1 (%), best on val", *map(_feature_name, features)], rows


def _linear_details(ours: Mapping[str, Any]) -> tuple[list[str], Rows]:
    header = ["linear top-1 (%)", "feature", "best on val", "its lr", "its epoch"]
    header += ["last, official lr", "last, best lr"]
    every = [report for result in ours.values() for report in result["features"].values()]
    held_out = any("chosen" in report for report in every)
    rows: Rows = []
    for name, result in ours.items():
        for feature, report in result["features"].items():
            best, last = report["best"], max(entry["top1"] for entry in report["last"])
            official = report.get("protocol_lr", {}).get("last", {}).get("top1")
            row: list[object] = [name, f"{_feature_name(feature)}, {report['dim']}"]
            row += [_percent(best["top1"]), f"{best['lr']:g}", best["epoch"]]
            row += [_percent(official), _percent(last)]
            if held_out:
                row.append(_percent(report.get("chosen", {}).get("top1")))
            rows.append(row)
    return [*header, "chosen on held-out"] if held_out else header, rows


def _few_shot_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> tuple[list[str], Rows]:
    settings = list(next(iter(ours.values()))["top1"])
    rows: Rows = []
    for name, result in ours.items():
        entries = (result["top1"][s] for s in settings)
        rows.append([name, *(_spread(entry["mean"], entry["std"]) for entry in entries)])
    for row in paper:
        if any(s in row.few_shot for s in settings):
            values = ((row.few_shot.get(s), row.few_shot_std.get(s)) for s in settings)
            rows.append([_paper_name(row), *(_spread(*pair) for pair in values)])
    return ["few-shot top-1 (%)", *settings], rows


def _transfer_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> tuple[list[str], Rows]:
    names = list(next(iter(ours.values()))["datasets"])
    rows: Rows = []
    for name, result in ours.items():
        for metric, words in (("top1", "top-1"), ("mean_per_class", "mean per class")):
            values = [_percent(result["datasets"][d][metric]) for d in names]
            rows.append([f"{name}, {words}", *values, _percent(result["average"][metric])])
    for row in paper:
        if any(d in row.transfer for d in names):
            values = [_percent(row.transfer.get(d)) for d in names]
            average = _percent(row.transfer["average"]) if set(names) == set(TABLE_5) else None
            rows.append([_paper_name(row, "Table 5"), *values, average])
    return ["linear transfer (%)", *names, "average"], rows


def _transfer_details(ours: Mapping[str, Any]) -> tuple[list[str], Rows]:
    header = ["linear transfer", "data set", "classes", "training images", "test images"]
    header += ["chosen l2 strength", "cross-validated top-1 (%)", "fits cut short"]
    rows: Rows = []
    for name, result in ours.items():
        for dataset, found in result["datasets"].items():
            row = [found[key] for key in ("classes", "train_images", "test_images")]
            cv = found["cv"]["top1"][found["cv"]["weight_decay"].index(found["weight_decay"])]
            row += [f"{found['weight_decay']:.3g}", _percent(cv), found["unfinished_fits"]]
            rows.append([name, dataset, *row])
    return header, rows


def _finetune_rows(ours: Mapping[str, Any], paper: Sequence[PaperRow]) -> tuple[list[str], Rows]:
    rows: Rows = []
    for name, result in ours.items():
        best = result["best"]
        scores = (_percent(best[metric]) for metric in ("top1", "mean_per_class"))
        rows.append([name, *scores, f"{best['lr']:g}", best["epoch"]])
    dataset = next(iter(ours.values()))["settings"]["dataset"] or "imagenet"
    for row in paper:
        if dataset in row.finetune:
            # Tables 14 and 15 give the mean per class for Aircraft only
            value = _percent(row.finetune[dataset])
            pair = (None, value) if dataset == "aircraft" else (value, None)
            data = "ImageNet" if dataset == "imagenet" else dataset
            rows.append([_paper_name(row, data), *pair, None, None])
    return ["fine-tuned (%)", "best on val, top-1", "mean per class", "lr", "epoch"], rows


ROWS: dict[str, Callable[[Mapping[str, Any], Sequence[PaperRow]], tuple[list[str], Rows]]] = {
    "knn": _knn_rows,
    "linear": _linear_rows,
    "few_shot": _few_shot_rows,
    "transfer": _transfer_rows,
    "finetune": _finetune_rows,
}
DETAILS: dict[str, Callable[[Mapping[str, Any]], tuple[list[str], Rows]]] = {
    "linear": _linear_details,
    "transfer": _transfer_details,
}
TITLES = {
    "knn": "Nearest neighbours",
    "linear": "Linear probes",
    "few_shot": "Few-shot classification",
    "transfer": "Linear transfer to small data sets",
    "finetune": "Fine-tuning",
}
NOTES = {
    "knn": "Weighted cosine votes of the k nearest training images. The paper sweeps k and finds 10 best.",
    "linear": "Best on val is the number of the official code: epoch and learning rate chosen on the "
    "validation set itself, so it is optimistic. The last epoch at the official learning rate was chosen "
    "by nobody; held-out training images, where there are some, choose without looking at the test.",
    "few_shot": "Mean and standard deviation over the splits of softmax regression on a few labelled images.",
    "transfer": "Softmax regression on raw features; the l2 strength was chosen by cross-validation on "
    "the training set alone. The paper's table says accuracy; both metrics are shown. Fits are cut short "
    "after transfer.max_iter iterations, as the original code does.",
    "finetune": "The whole network trained with labels. The best validation epoch is optimistic.",
}


DETAILS_NOTES = {
    "linear": "What was chosen, and what the last epoch gives:",
    "transfer": "What cross-validation chose:",
}


def _knn_chart(ours: Mapping[str, Any]) -> Figure:
    figure, axes = axes_figure("k (neighbours)", "top-1 accuracy (%)")
    for name, result in ours.items():
        ks = _ks(result)
        axes.plot([int(k[1:]) for k in ks], [result[k]["top1"] for k in ks], "o-", label=name)
    axes.set_xscale("log")
    ticks = [int(k[1:]) for k in _ks(next(iter(ours.values())))]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure


def _linear_chart(ours: Mapping[str, Any]) -> Figure:
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


def _few_shot_chart(ours: Mapping[str, Any]) -> Figure:
    figure, axes = axes_figure("labelled images", "top-1 accuracy (%)")
    for i, (name, result) in enumerate(ours.items()):
        entries = list(result["top1"].values())
        means, spread = ([entry[key] for entry in entries] for key in ("mean", "std"))
        places = [place + 0.1 * (i - (len(ours) - 1) / 2) for place in range(len(entries))]
        axes.errorbar(places, means, spread, fmt="o", capsize=4, label=name)
    settings = list(next(iter(ours.values()))["top1"])
    axes.set_xticks(range(len(settings)), settings)
    axes.legend()
    return figure


def _transfer_chart(ours: Mapping[str, Any]) -> Figure:
    figure, axes = axes_figure("l2 strength", "cross-validated top-1 (%)")
    first = next(iter(ours.values()))
    for name, result in first["datasets"].items():
        axes.plot(result["cv"]["weight_decay"], result["cv"]["top1"], label=name)
    axes.set_xscale("log")
    axes.legend(ncols=2, fontsize="small")
    return figure


def _finetune_chart(ours: Mapping[str, Any]) -> Figure:
    figure, axes = axes_figure("epoch", "top-1 accuracy (%)")
    for result in ours.values():
        for run in result["runs"]:
            scores = [(entry["epoch"], entry["top1"]) for entry in run["epochs"]]
            axes.plot(*zip(*scores, strict=True), "o-", markersize=3, label=f"lr {run['lr']:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


CHARTS: dict[str, tuple[Callable[[Mapping[str, Any]], Figure], str]] = {
    "knn": (_knn_chart, "Accuracy by the number of neighbours"),
    "linear": (_linear_chart, "Last epoch of every learning rate of the grid"),
    "few_shot": (_few_shot_chart, "Mean and standard deviation over the splits"),
    "transfer": (_transfer_chart, "What cross-validation saw, for the network itself"),
    "finetune": (_finetune_chart, "Validation accuracy of every learning rate"),
}


def _by_network(results: Results, evaluation: str) -> dict[str, Any]:
    return {name: found[evaluation] for name, found in results.items() if evaluation in found}


def text_table(results: Results, evaluation: str) -> str:
    """Our rows of one evaluation as plain text, without the paper's.

    Example:
        >>> ours = {"DINO": {"knn": {"k10": {"top1": 50.0, "top5": 75.0}}}}
        >>> print(text_table(ours, "knn"))
        kNN top-1 (%)  k = 10
        DINO            50.00
        DINO, top-5     75.00
    """
    ours = _by_network(results, evaluation)
    tables = [_aligned(*ROWS[evaluation](ours, []))]
    if evaluation in DETAILS:
        tables.append(_aligned(*DETAILS[evaluation](ours)))
    return "\n\n".join(tables)


def _aligned(header: Sequence[str], rows: Rows) -> str:
    everything: Rows = [list(header), *rows]
    cells = [["-" if cell is None else str(cell) for cell in row] for row in everything]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *rest]))
    return "\n".join(lines)


def evaluation_page(
    results: Results, architecture: str | None, title: str, record: Mapping[str, Any]
) -> Page:
    """Lay out the results of a network and its baselines beside the paper's rows.

    Args:
        results: network (the evaluated one first, then baselines) to evaluation to result.
        architecture: as ``ViTShape.name``; chooses the paper's rows.
        title: of the page.
        record: checkpoint, settings, versions, times, shown behind a click.
    """
    page = Page(title, str(record.get("subtitle", "")))
    rows = paper_rows(architecture)
    first = next(iter(results.values()))
    for evaluation in first:
        ours = _by_network(results, evaluation)
        page.section(TITLES[evaluation])
        page.text(NOTES[evaluation])
        if evaluation in CHARTS:
            draw, caption = CHARTS[evaluation]
            page.charts((themed(lambda draw=draw, ours=ours: draw(ours)), caption))  # type: ignore[misc]
        page.raw(table(*ROWS[evaluation](ours, rows)))
        if evaluation in DETAILS:
            page.text(DETAILS_NOTES[evaluation])
            page.raw(table(*DETAILS[evaluation](ours)))
    page.text(
        "Rows marked “paper” are the paper's own numbers, on the data in brackets (Table 5: on the data "
        "sets named above them), not measured here. They compare only where data, resolution and schedule "
        "are the paper's.",
        note=True,
    )
    page.details("Checkpoint, settings and versions", json.dumps(record, indent=2, default=str))
    return page
