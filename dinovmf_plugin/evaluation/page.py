"""The page that shows evaluations: our rows, the baselines' and the paper's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dinovmf_plugin.evaluation.protocol import Protocol
from dinovmf_plugin.report.page import Page
from dinovmf_plugin.report.paper import paper_rows
from dinovmf_plugin.report.theme import themed

__all__ = ["evaluation_page"]


def evaluation_page(
    protocols: Sequence[Protocol],
    results: Mapping[str, Mapping[str, Any]],
    architecture: str | None,
    title: str,
    record: Mapping[str, Any],
) -> Page:
    """Lay out the results of a network and its baselines beside the paper's rows.

    Args:
        protocols: the evaluations, in the order of their sections.
        results: network (the evaluated one first, then baselines) to evaluation to result.
        architecture: as ``ViTShape.name``; chooses the paper's rows.
        title: of the page.
        record: checkpoint, settings, versions, times, shown behind a click.
    """
    page = Page(title, str(record.get("subtitle", "")))
    rows = paper_rows(architecture)
    for protocol in protocols:
        ours = {n: found[protocol.name] for n, found in results.items() if protocol.name in found}
        page.section(protocol.title)
        page.text(protocol.note)
        if (chart := protocol.chart) is not None:
            drawn = themed(lambda draw=chart.draw, ours=ours: draw(ours))  # type: ignore[misc]
            page.charts((drawn, chart.caption))
        page.table(protocol.rows(ours, rows))
        if protocol.details is not None:
            page.text(protocol.details.note)
            page.table(protocol.details.table(ours))
    page.text(
        "Rows marked “paper” are the paper's own numbers, on the data in brackets (Table 5: on the data "
        "sets named above them), not measured here. They compare only where data, resolution and schedule "
        "are the paper's.",
        note=True,
    )
    page.details("Checkpoint, settings and versions", json.dumps(record, indent=2, default=str))
    return page
