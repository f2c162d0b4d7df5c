"""A self-contained HTML page: text, tables, charts in two themes, sheets of thumbnails."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from dinovmf_plugin.report.html import render, render_page
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import data_uri

__all__ = ["Page", "Sheet", "Thumbnail"]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a sheet.

    Attributes:
        content: JPEG or PNG bytes.
        width: in CSS pixels.
        caption: below it, may be empty.
        title: shown on hovering; also the alternative text.
    """

    content: bytes
    width: int
    caption: str = ""
    title: str = ""

    @property
    def source(self) -> str:
        """The picture as a ``data:`` URI."""
        return data_uri(self.content, "image/jpeg")


@dataclass(frozen=True)
class Sheet:
    """A row of pictures with a heading.

    Attributes:
        title: what they have in common.
        note: set smaller behind the title.
        pictures: thumbnails in order.
    """

    title: str
    note: str
    pictures: Sequence[Thumbnail]


@dataclass
class Page:
    """Collects sections and writes one file without external references.

    Example:
        >>> page = Page("Title", "subtitle")
        >>> page.section("Part")
        >>> page.text("a < b")
        >>> "a &lt; b" in page.html()
        True
    """

    title: str
    subtitle: str = ""
    parts: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Start a section; it appears in the navigation."""
        self.sections.append(title)
        self._add("section", {"number": len(self.sections), "title": title})

    def text(self, text: str, *, note: bool = False) -> None:
        """A paragraph of plain text."""
        self._add("text", {"text": text, "note": note})

    def table(self, table: Table) -> None:
        """A table that scrolls sideways where it is wider than the page."""
        self.parts.append(table.html())

    def sheet(self, sheet: Sheet) -> None:
        """A row of small pictures."""
        self._add("sheet", sheet)

    def picture(self, image: Image.Image, alt: str) -> None:
        """One picture (as JPEG) that fits the page's width."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
        self._add("picture", {"alt": alt, "source": data_uri(buffer.getvalue(), "image/jpeg")})

    def facts(self, facts: Mapping[str, object]) -> None:
        """The numbers that matter, large."""
        self._add("facts", facts)

    def charts(self, *charts: tuple[Mapping[str, bytes], str]) -> None:
        """Charts side by side where there is room: (SVG per theme, caption) each."""
        content = [
            {name: data_uri(svg, "image/svg+xml") for name, svg in themes.items()}
            | {"caption": caption}
            for themes, caption in charts
        ]
        self._add("charts", content)

    def details(self, summary: str, text: str) -> None:
        """Preformatted text behind a click."""
        self._add("details", {"summary": summary, "text": text})

    def html(self) -> str:
        """The whole page."""
        return render_page(self)

    def _add(self, part: str, content: object) -> None:
        self.parts.append(render(part, content))
