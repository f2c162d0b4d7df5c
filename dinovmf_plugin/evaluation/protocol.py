"""What one evaluation is, from its settings to its chart: a protocol is one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from dinovmf_plugin.evaluation.settings import EvaluationSettings, Section
from dinovmf_plugin.evaluation.workbench import Images, Run
from dinovmf_plugin.report.paper import PaperRow
from dinovmf_plugin.report.tables import Table

__all__ = ["Chart", "Details", "Protocol", "Results"]

Results = Mapping[str, Any]
"""Name of a network to its result of one evaluation."""


@dataclass(frozen=True)
class Details:
    """A second table, with the sentence that stands before it."""

    note: str
    table: Callable[[Results], Table]


@dataclass(frozen=True)
class Chart:
    """A figure with its caption."""

    caption: str
    draw: Callable[[Results], Figure]


@dataclass(frozen=True)
class Protocol:
    """One evaluation.

    Attributes:
        name: its key in configs, results and file names.
        title: heading of its section.
        note: what the numbers mean, for people who read the page.
        settings: dataclass of its keys.
        prepare: checks what cannot work before any pass of a network, and gives what runs it; None
            where the evaluation has a runner of its own.
        rows: our results beside the paper's rows.
        details: a second table, if there is more to say.
        chart: a figure, if there is one.
    """

    name: str
    title: str
    note: str
    settings: type[Section]
    prepare: Callable[[Any, Images, EvaluationSettings], Run] | None
    rows: Callable[[Results, Sequence[PaperRow]], Table]
    details: Details | None = None
    chart: Chart | None = None

    def text(self, ours: Results) -> str:
        """Our rows and details as plain text, without the paper's.

        Args:
            ours: name of a network to its result.
        """
        tables = [self.rows(ours, [])]
        if self.details is not None:
            tables.append(self.details.table(ours))
        return "\n\n".join(table.text() for table in tables)
