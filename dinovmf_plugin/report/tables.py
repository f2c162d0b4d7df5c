"""One table for terminals, Markdown and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from dinovmf_plugin.report.html import render
from dinovmf_plugin.report.numbers import shown

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Header and rows; the first column holds names, the others values.

    Attributes:
        header: of every column.
        rows: cells; see ``numbers.shown`` for how they are written.

    Example:
        >>> table = Table(["", "largest"], [["DINO", 54877], ["DINO-vMF", None]])
        >>> print(table.text())
                  largest
        DINO       54,877
        DINO-vMF        –
        >>> print(table.markdown())
        |          |   largest |
        |:---------|----------:|
        | DINO     |    54,877 |
        | DINO-vMF |         – |
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def _as(self, layout: str) -> str:
        cells = [[shown(cell) for cell in row] for row in self.rows]
        align = ["left", *["right"] * (len(self.header) - 1)]
        return tabulate(
            [list(self.header), *cells],
            headers="firstrow",
            tablefmt=layout,
            disable_numparse=True,
            colalign=align if cells else None,
        )

    def text(self) -> str:
        """Aligned columns for a terminal."""
        return self._as("plain")

    def markdown(self) -> str:
        """GitHub's syntax."""
        return self._as("pipe")

    def html(self) -> str:
        """A ``table`` that scrolls sideways where it is wider than the page."""
        return render("table", self)
