"""The retrieval results as a page: scores beside the paper's, rankings, every query's AP."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from dinovmf_plugin.report.page import Page
from dinovmf_plugin.report.paper import paper_rows
from dinovmf_plugin.report.tables import Table

__all__ = ["format_scores", "retrieval_page"]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def format_scores(results: dict[str, Any]) -> str:
    """The scores as a table in percent.

    Example:
        >>> score = {"mAP": 0.5, "mP@1": 1.0, "mP@5": float("nan"), "mP@10": 0.25}
        >>> print(format_scores({"dataset": "tiny", "scores": {"easy": score}}))
        tiny     mAP    mP@1    mP@5    mP@10
        easy    50.0   100.0     nan     25.0
    """
    scores = results["scores"]
    columns = list(next(iter(scores.values())))
    rows = [
        [difficulty, *(_percent(score[name]) for name in columns)]
        for difficulty, score in scores.items()
    ]
    return Table([results["dataset"], *columns], rows).text()


def _score_rows(
    results: dict[str, Any], label: str, architecture: str | None
) -> list[list[object]]:
    scores, dataset = results["scores"], results["dataset"]
    rows: list[list[object]] = [
        [label, *(_percent(scores[difficulty]["mAP"]) for difficulty in scores)]
    ]
    for row in paper_rows(architecture):
        if dataset in row.retrieval:
            medium, hard = row.retrieval[dataset]
            rows.append([row.label(), None, f"{medium:.1f}", f"{hard:.1f}"])
    return rows


def retrieval_page(
    results: dict[str, Any], label: str, architecture: str | None, sheet: Image.Image | None
) -> str:
    """A self-contained HTML page.

    Args:
        results: what ``evaluate_retrieval`` returns.
        label: short name of the network.
        architecture: such as ``vit_small/16``; chooses the paper's rows.
        sheet: the picture of ``draw_rankings``, if there is one.
    """
    scores, speed = results["scores"], results["speed"]
    page = Page(f"Retrieval on {results['dataset']}: {label}", results["descriptor"])
    page.facts(
        {
            "medium mAP (%)": _percent(scores["medium"]["mAP"]),
            "hard mAP (%)": _percent(scores["hard"]["mAP"]),
            "queries": results["images"]["queries"],
            "database images": results["images"]["database"],
            f"seconds per image on {speed['device']}": speed["database"]["seconds_per_image"],
        }
    )
    page.section("Mean average precision")
    rows = _score_rows(results, label, architecture)
    page.table(Table(["mAP (%)", "easy", "medium", "hard"], rows))
    if len(rows) > 1:
        page.text(
            "The paper's rows are its own numbers (Table 6, ImageNet-1k, face-blurred images), not "
            "measured here. They compare only where data, image size and scales are the paper's.",
            note=True,
        )
    page.section("Precision at the top")
    columns = [name for name in scores["medium"] if name != "mAP"]
    page.table(
        Table(
            ["(%)", *columns],
            [
                [difficulty, *(_percent(score[name]) for name in columns)]
                for difficulty, score in scores.items()
            ],
        )
    )
    if sheet is not None:
        page.section("First results")
        page.text(
            "Left the query (Q). Green, E: easy positive. Blue, H: hard positive. Gray, J: not counted. "
            "Red, x: wrong."
        )
        page.picture(sheet, "queries and their first results")
    page.section("Every query")
    per_query = [
        [name, *(_percent(value[difficulty]) for difficulty in scores)]
        for name, value in results["average_precision"].items()
    ]
    page.table(Table(["AP (%)", *scores], per_query))
    record = {key: results[key] for key in ("checkpoint", "settings", "speed", "versions")}
    page.details("Checkpoint, settings and versions", json.dumps(record, indent=2, default=str))
    return page.html()
