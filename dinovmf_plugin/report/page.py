"""A self-contained HTML page: text, tables, charts in two themes, sheets of thumbnails."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinovmf_plugin.report.theme import data_uri

__all__ = ["Page", "Sheet", "Thumbnail", "table"]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #24292f; --soft: #57606a;
  --line: #d0d7de; --card: #f6f8fa; --accent: #1f6feb; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --text: #dde3ea; --soft: #9aa5b1;
  --line: #363c45; --card: #1e2229; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0 1rem; max-width: 46rem; }
.soft, figcaption, .note { color: var(--soft); font-size: .875rem; }
nav { margin: 1rem 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: var(--accent); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .85rem; }
.fact b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.fact span { color: var(--soft); font-size: .82rem; }
figure { margin: 1rem 0; } figure picture img { max-width: 100%; height: auto; display: block; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.charts figure { flex: 0 1 auto; max-width: 100%; }
.charts.several figure { flex: 1 1 26rem; max-width: 32rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.sheet { margin: 0 0 1.25rem; }
.sheet h3 { font-size: .95rem; margin: 0 0 .35rem; font-weight: 600; }
.sheet h3 span { font-weight: 400; color: var(--soft); }
.strip { display: flex; flex-wrap: wrap; gap: 6px; }
.strip figure { margin: 0; max-width: 100%; }
.strip img { display: block; border-radius: 4px; max-width: 100%; height: auto; }
.strip figcaption { font-size: .72rem; max-width: 12rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
details { margin-top: 1.5rem; } summary { cursor: pointer; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  overflow-x: auto; font-size: .8rem; line-height: 1.45; }
"""


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

    def html(self) -> str:
        """The sheet as HTML."""
        cells = "".join(
            f'<figure><img src="{data_uri(p.content, "image/jpeg")}" width="{p.width}" '
            f'alt="{html.escape(p.title)}" title="{html.escape(p.title)}" loading="lazy">'
            + (
                f'<figcaption style="max-width:{p.width}px">{html.escape(p.caption)}</figcaption>'
                if p.caption
                else ""
            )
            + "</figure>"
            for p in self.pictures
        )
        return (
            f'<div class="sheet"><h3>{html.escape(self.title)} '
            f'<span>{html.escape(self.note)}</span></h3><div class="strip">{cells}</div></div>'
        )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as HTML; numbers get thousands separators or three significant decimals.

    Example:
        >>> "<td>54,877</td>" in table(["model", "largest"], [["DINO", 54877]])
        True
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def shown(value: object) -> str:
    """A value as people read it.

    Example:
        >>> [shown(v) for v in (65536, 0.12345, 117.25, None, "x")]
        ['65,536', '0.123', '117', '–', 'x']
    """
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace(" ± ", "\u00a0±\u00a0")  # never broken over two lines


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
        self.parts.append(f'<h2 id="s{len(self.sections)}">{html.escape(title)}</h2>')

    def text(self, text: str, *, note: bool = False) -> None:
        """A paragraph of plain text."""
        kind = ' class="note"' if note else ""
        self.parts.append(f"<p{kind}>{html.escape(text)}</p>")

    def raw(self, content: str) -> None:
        """HTML that is escaped already."""
        self.parts.append(content)

    def facts(self, facts: Mapping[str, object]) -> None:
        """The numbers that matter, large."""
        cells = "".join(
            f'<div class="fact"><b>{html.escape(shown(value))}</b>'
            f"<span>{html.escape(name)}</span></div>"
            for name, value in facts.items()
        )
        self.parts.append(f'<div class="facts">{cells}</div>')

    def charts(self, *charts: tuple[Mapping[str, bytes], str]) -> None:
        """Charts side by side where there is room: (SVG per theme, caption) each."""
        cells = []
        for themes, caption in charts:
            light, dark = (data_uri(themes[name], "image/svg+xml") for name in ("light", "dark"))
            text = html.escape(caption)
            cells.append(
                f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
                f'<img src="{light}" alt="{text}"></picture><figcaption>{text}</figcaption></figure>'
            )
        kind = "charts several" if len(charts) > 1 else "charts"
        self.parts.append(f'<div class="{kind}">{"".join(cells)}</div>')

    def details(self, summary: str, text: str) -> None:
        """Preformatted text behind a click."""
        self.parts.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<a href="#s{i}">{html.escape(name)}</a>' for i, name in enumerate(self.sections, 1)
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f"<h1>{html.escape(self.title)}</h1>"
            f'<div class="soft">{html.escape(self.subtitle)}</div>'
            f"<nav>{links}</nav>{''.join(self.parts)}</body></html>\n"
        )
