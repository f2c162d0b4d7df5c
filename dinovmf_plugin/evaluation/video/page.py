"""Scores of single sequences joined into totals and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dinovmf_plugin.evaluation.video.scores import summarize_objects
from dinovmf_plugin.report.page import Page
from dinovmf_plugin.report.paper import paper_rows
from dinovmf_plugin.report.tables import Table

__all__ = ["collect_sequences", "format_table", "object_table", "video_page"]


def collect_sequences(paths: Sequence[Path]) -> dict[str, Any]:
    """Join the score files of the sequences.

    Returns:
        ``scores`` and ``copy_first_mask`` (DAVIS's seven numbers over all objects), ``sequences``
        (the files' contents by name) and ``seconds_per_frame`` of each part.
    """
    stored = [json.loads(path.read_text()) for path in paths]
    frames = sum(result["frames"] for result in stored)
    return {
        "scores": summarize_objects([s for r in stored for s in r["objects"].values()]),
        "copy_first_mask": summarize_objects(
            [s for r in stored for s in r["copy_first_mask"].values()]
        ),
        "sequences": {result["sequence"]: result for result in stored},
        "seconds_per_frame": {
            part: sum(r["seconds_per_frame"][part] * r["frames"] for r in stored) / frames
            for part in ("backbone", "propagation", "scoring")
        },
    }


def object_table(sequences: dict[str, Any]) -> bytes:
    """CSV with the columns of DAVIS's own per-sequence table, a row per object."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Sequence", "J-Mean", "F-Mean"])
    for name, result in sequences.items():
        for number, scores in result["objects"].items():
            values = (f"{scores[metric]['mean']:.6f}" for metric in ("J", "F"))
            writer.writerow([f"{name}_{number}", *values])
    return text.getvalue().encode()


def _means(results: dict[str, Any]) -> list[tuple[str, int, float, float, float]]:
    """(name, objects, J, F, J&F) of every sequence, of all, and of copying the first mask."""
    scored = [
        (name, len(result["objects"]), summarize_objects(list(result["objects"].values())))
        for name, result in results["sequences"].items()
    ]
    count = sum(number for _, number, _ in scored)
    scored += [
        ("all", count, results["scores"]),
        ("copying the first mask", count, results["copy_first_mask"]),
    ]
    return [
        (name, number, scores["J-Mean"], scores["F-Mean"], scores["J&F-Mean"])
        for name, number, scores in scored
    ]


def format_table(results: dict[str, Any]) -> str:
    """Per-sequence means and the seven global numbers, in percent, as text.

    Example:
        >>> score = {"mean": 0.5, "recall": 1.0, "decay": 0.0}
        >>> seq = {"objects": {"1": {"J": score, "F": score}}}
        >>> total = summarize_objects([{"J": score, "F": score}])
        >>> print(format_table({"scores": total, "copy_first_mask": total, "sequences": {"a": seq}}))
        sequence                  objects     J     F    J&F
        a                               1  50.0  50.0   50.0
        all                             1  50.0  50.0   50.0
        copying the first mask          1  50.0  50.0   50.0
        J recall 100.0  J decay 0.0  F recall 100.0  F decay 0.0
    """
    rows = [
        [name, number, *(f"{100 * value:.1f}" for value in values)]
        for name, number, *values in _means(results)
    ]
    rest = "  ".join(
        f"{metric} {statistic.lower()} {100 * results['scores'][f'{metric}-{statistic}']:.1f}"
        for metric in ("J", "F")
        for statistic in ("Recall", "Decay")
    )
    return f"{Table(['sequence', 'objects', 'J', 'F', 'J&F'], rows).text()}\n{rest}"


def video_page(
    results: dict[str, Any], label: str, architecture: str | None, sheets: Mapping[str, Path]
) -> str:
    """A self-contained HTML page.

    Args:
        results: what ``evaluate_video_segmentation`` returns.
        label: short name of the network.
        architecture: such as ``vit_small/16``; chooses the paper's rows.
        sheets: contact sheet of every sequence; shown where the file is there.
    """
    total, speed = results["scores"], results["seconds_per_frame"]
    page = Page(f"Video segmentation: {label}", f"{len(results['sequences'])} sequences")
    page.facts(
        {
            "J&F mean (%)": f"{100 * total['J&F-Mean']:.1f}",
            "J mean (%)": f"{100 * total['J-Mean']:.1f}",
            "F mean (%)": f"{100 * total['F-Mean']:.1f}",
            "seconds per frame": sum(speed[part] for part in ("backbone", "propagation")),
        }
    )
    page.section("Totals")
    columns = list(total)
    rows: list[list[object]] = [
        [name, *(f"{100 * scores[column]:.1f}" for column in columns)]
        for name, scores in (
            (label, total),
            ("copying the first mask", results["copy_first_mask"]),
        )
    ]
    for row in paper_rows(architecture):
        if row.video is None:
            continue
        both, region, contour = row.video
        known = {
            "J&F-Mean": f"{both:.1f}",
            "J-Mean": f"{region:.1f}",
            "F-Mean": f"{contour:.1f}",
        }
        rows.append([row.label(), *(known.get(column) for column in columns)])
    page.table(Table(["(%)", *columns], rows))
    page.text(
        "The paper's rows are its own numbers (Table 7, ImageNet-1k, DAVIS-2017 val), not measured here; "
        "they compare only on that data. "
        "J is the overlap, F the agreement of the contours; recall counts frames above 50 %, decay is the "
        "loss from the first quarter of a video to the last.",
        note=True,
    )
    page.section("Sequences")
    cells = [
        [name, number, *(f"{100 * v:.1f}" for v in values)]
        for name, number, *values in _means(results)
    ]
    page.table(Table(["sequence", "objects", "J (%)", "F (%)", "J&F (%)"], cells))
    shown = {name: path for name, path in sheets.items() if path.is_file()}
    if shown:
        page.section("Pictures")
    for name, path in shown.items():
        page.text(name)
        with Image.open(path) as image:
            page.picture(image, f"{name}: annotations above, predictions below")
    record = {key: results[key] for key in ("checkpoint", "settings", "versions")}
    record["seconds_per_frame"] = speed
    page.details("Checkpoint, settings and versions", json.dumps(record, indent=2, default=str))
    return page.html()
