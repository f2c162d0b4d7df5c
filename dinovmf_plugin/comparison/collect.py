"""All finished runs of a folder as one JSON file, one page, one Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dinovmf_plugin.comparison.charts import (
    curve_charts,
    learning_of_groups,
    seeds_chart,
    stability_chart,
)
from dinovmf_plugin.comparison.measures import differences_table, learning_table, learnt
from dinovmf_plugin.comparison.results import Group, group_runs, read_results, short_labels
from dinovmf_plugin.comparison.statistics import mean_and_std, with_spread
from dinovmf_plugin.comparison.tables import (
    ablation_table,
    breaking_points,
    collapsed_sentences,
    comparison_table,
    difference_sentences,
    metric_name,
    paper_table,
    runs_table,
    stability_sentences,
    stability_table,
    utilization_table,
)
from dinovmf_plugin.report.learning import LEARNING_NOTE
from dinovmf_plugin.report.page import Page
from dinovmf_plugin.report.paper import paper_ablation
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.runs.files import write_file, write_json
from dinovmf_plugin.training.crops import SHEET

__all__ = ["collect"]

_LIMITS = (
    "Mean ± standard deviation over seeds. One seed moves initialization, order and crops of the training "
    "together; the held-out images and the labeled splits are the same for all runs. p: paired t-test over "
    "the seeds, not corrected for the number of comparisons. Runs that collapsed count in no mean."
)


def _summary(group: Group) -> dict[str, Any]:
    metrics = {}
    for metric in group.metrics:
        values = group.values(metric)
        mean, std = mean_and_std(values)
        metrics[metric] = {"mean": mean, "std": std, "values": values}
    return {
        "label": group.label,
        "lr": group.lr,
        "normalization": group.switches[0],
        "centering": group.switches[1],
        "seeds": [run["seed"] for run in group.runs],
        "outcomes": [run["outcome"] for run in group.runs],
        "metrics": metrics,
    }


def _ordered(groups: Sequence[Group], kind: str) -> list[Group]:
    """The ablation in the order of Table 1, others as they were found."""
    if kind != "ablation":
        return list(groups)
    order = list(paper_ablation())
    return sorted(
        groups,
        key=lambda g: (order.index(g.switches) if g.switches in order else len(order), g.spread),
    )


def _baseline(groups: Sequence[Group], kind: str, against: str | None) -> Group:
    """The one that is named, else DINO's own cell in the ablation, the first candidate otherwise."""
    if against is not None:
        named = [group for group in groups if group.label == against]
        if not named:
            names = ", ".join(group.label for group in groups)
            raise ValueError(f"against={against!r} must be one of those that train: {names}")
        return named[0]
    plain = [g for g in groups if g.switches == ("none", "logit") and g.whole]
    return plain[0] if kind == "ablation" and plain else groups[0]


def _tables(
    groups: Sequence[Group], kind: str, headline: str, baseline: Group | None
) -> list[tuple[str, Table]]:
    metrics = list(dict.fromkeys(metric for group in groups for metric in group.metrics))
    knn = [metric for metric in metrics if metric.startswith("knn_")]
    others = [metric for metric in metrics if not metric.startswith("knn_")]
    found: list[tuple[str, Table]] = []
    if kind == "ablation":
        spreads = sorted({group.spread for group in groups})
        for spread in spreads:
            title = f"{metric_name(headline)}, top-1 (%)"
            title += f", prototype_spread={spread:g}" if len(spreads) > 1 else ""
            mine = [group for group in groups if group.spread == spread]
            found.append((title, ablation_table(mine, headline)))
        if others:
            found.append(("Linear and few-shot", comparison_table(groups, others)))
    else:
        found.append(("Top-1 (%)", comparison_table(groups, [headline, *others])))
        paper = paper_table(groups)
        if paper is not None:
            found.append(("The paper's numbers on ImageNet, not on this data", paper))
    found.append(("kNN by number of neighbors", comparison_table(groups, knn)))
    learning = learning_table(groups, headline)
    if learning is not None:
        found.append(("What was learnt", learning))
    used = utilization_table(groups)
    if used is not None:
        found.append(("Prototypes of the teacher", used))
    if baseline is not None:
        differences = differences_table(groups, baseline, headline)
        if differences is not None:
            found.append((f"Differences from {baseline.name}", differences))
    return found


def _baseline_row(results: Sequence[dict[str, Any]], headline: str) -> str:
    names = dict.fromkeys(name for result in results for name in result["baselines"])
    parts = []
    for name in names:
        values = [r["baselines"][name][headline] for r in results if name in r["baselines"]]
        parts.append(f"{name} {with_spread(sorted(set(values)))} %")
    return f"{metric_name(headline)} without training: {', '.join(parts)}." if parts else ""


def collect(output_dir: str | Path, against: str | None = None) -> dict[str, Any]:
    """Write ``KIND.json``, ``KIND.html`` and ``KIND.md`` (KIND is ``ablation`` or ``compare``).

    Args:
        output_dir: of the comparison.
        against: name, as in the tables, of what all others are compared to; None: DINO's cell of an
            ablation, else the first candidate.

    Returns:
        What the JSON file holds.

    Raises:
        FileNotFoundError: if no run has finished.
        ValueError: if results contradict each other, or nothing that trains is named ``against``.
    """
    root = Path(output_dir)
    results = read_results(root)
    settings = results[0]["settings"]
    kind, k = settings["kind"], settings["k"]
    headline = f"knn_k{k}"
    whole = _ordered(group_runs(results), kind)
    names = short_labels(list(dict.fromkeys(group.label for group in whole)))
    groups = [replace(group, label=names[group.label]) for group in whole]
    varied = [group for group in groups if group.lr is not None]
    compared = [group for group in groups if group.whole]
    sentences = collapsed_sentences(groups)
    baseline = None
    if against is not None or (compared and not varied):
        baseline = _baseline([] if varied else compared, kind, against)
        sentences += difference_sentences(compared, headline, baseline)
    stability = stability_sentences(varied) if varied else []
    tables = _tables(compared, kind, headline, baseline) if compared else []
    tables.append(("Every run", runs_table(groups, headline)))
    if varied:
        tables.insert(0, ("kNN by learning rate, top-1 (%)", stability_table(varied, headline)))
    floor = _baseline_row(results, headline)
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    summary: dict[str, Any] = {
        "kind": kind,
        "headline": headline,
        "groups": [_summary(group) for group in whole],
        "sentences": [*stability, *([] if varied else sentences)],
        "names": [
            f"{short}: {label}."
            for label, short in names.items()
            if label != short and kind != "ablation"
        ],
        "without_training": floor,
        "hours": round(hours, 3),
        "machines": _distinct([result["machine"] for result in results]),
        "versions": _distinct([result["versions"] for result in results]),
        "settings": settings,
        "recipe": results[0]["recipe"],
        "runs": [_record(result) for result in results],
    }
    if varied:
        summary["breaking_points"] = breaking_points(varied)
    if kind == "ablation":
        summary["paper_imagenet_vits16_100_epochs"] = {
            f"{n}/{c}": {"table_1": cell.mean, "table_8": list(cell.seeds)}
            for (n, c), cell in paper_ablation().items()
        }
    write_json(root / f"{kind}.json", summary)
    text = _markdown(summary, tables)
    write_file(root / f"{kind}.md", text)
    write_file(root / f"{kind}.html", _page(root, summary, tables, groups, varied).html())
    print(f"\n{text}\n{root / kind}.json, .html, .md")
    return summary


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _record(result: dict[str, Any]) -> dict[str, Any]:
    keys = ("folder", "identity", "label", "lr", "seed", "outcome", "diverged", "metrics")
    kept = {key: result[key] for key in (*keys, "baselines", "prototypes", "seconds", "started")}
    return {**kept, "learnt": learnt(result), "curve": result["curve"]}


def _setting(summary: dict[str, Any]) -> str:
    recipe = summary["recipe"]
    machines = "; ".join(
        m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
        for m in summary["machines"]
    )
    return (
        f"{recipe['backbone']['name']}, {recipe['max_epochs']} epochs, "
        f"{recipe['method_kwargs']['num_prototypes']} prototypes, {recipe['data']['train_path']}; "
        f"{len(summary['runs'])} runs, {summary['hours']:.2f} hours of {machines}."
    )


def _markdown(summary: dict[str, Any], tables: Sequence[tuple[str, Table]]) -> str:
    parts = [_setting(summary)]
    parts += [f"**{title}**\n\n{content.markdown()}" for title, content in tables]
    parts += [summary["without_training"], _LIMITS, " ".join(summary["names"])]
    parts.append("\n".join(f"- {sentence}" for sentence in summary["sentences"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _page(
    root: Path,
    summary: dict[str, Any],
    tables: Sequence[tuple[str, Table]],
    groups: Sequence[Group],
    varied: Sequence[Group],
) -> Page:
    kind, headline = summary["kind"], summary["headline"]
    title = {"ablation": "Normalization and centering", "compare": "Methods compared"}[kind]
    page = Page("Learning rate and stability" if varied else title, _setting(summary))
    page.section("Result")
    (first, content), *rest = tables
    page.text(first)
    page.table(content)
    for sentence in summary["sentences"]:
        page.text(sentence)
    page.text(f"{summary['without_training']} {_LIMITS}".strip(), note=True)
    if summary["names"]:
        page.text(" ".join(summary["names"]), note=True)
    ylabel = f"{metric_name(headline)}: top-1 (%)"
    if varied:
        page.charts((stability_chart(varied, headline, ylabel), "Accuracy over the learning rate"))
    else:
        page.charts((seeds_chart(groups, headline, ylabel), "Every seed, and the mean"))
    for name, content in rest:
        page.section(name)
        page.table(content)
    learning = learning_of_groups(groups)
    if learning:
        page.section("Does it learn?")
        page.text(LEARNING_NOTE)
        page.charts(
            (learning, "Information about the image in targets and student, mean of the seeds")
        )
    charts = curve_charts(groups, int(headline.removeprefix("knn_k")))
    if charts:
        page.section("Over time")
        page.charts(*charts)
    sheets = [root / run["folder"] / SHEET for run in summary["runs"]]
    shown_sheet = next((sheet for sheet in sheets if sheet.is_file()), None)
    if shown_sheet is not None:
        page.section("What the networks see")
        page.text("The first images of a run, one row each, with their global and local crops.")
        with Image.open(shown_sheet) as sheet:
            page.picture(sheet, "crops of the first training images")
    for run in summary["runs"]:
        if run["diverged"]:
            page.text(f"{run['label']}, seed {run['seed']}: {run['diverged']}", note=True)
    shown = {key: summary[key] for key in ("settings", "recipe", "versions", "machines")}
    page.details("Settings, versions, machines", json.dumps(shown, indent=2))
    return page
