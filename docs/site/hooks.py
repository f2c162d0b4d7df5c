"""The site beyond Markdown: pages from outside docs/, the notebook, formulas, nothing from a network."""

from __future__ import annotations

import html
import io
import posixpath
import re
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import nbformat
from fontTools import subset
from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOK = "first_steps.ipynb"

#: path in the repository -> page of the site
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "results/README.md": "results/README.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# a thin space around log, but none in log(x), nor after a sign
_LOG_BEFORE = re.compile(r"(</m(?:i|n|frac|style|sub|sup|row)>)(?=<mi>log</mi>)")
_LOG_AFTER = re.compile(r"(?<=<mi>log</mi>)(?!<mo stretchy|<mrow><mo)")
_THIN = '<mspace width="0.17em"/>'
_FOREIGN = re.compile(
    r'<(?:script|img|iframe|link(?![^>]*rel="canonical"))[^>]*\s(?:src|href)="(?:https?:)?//[^"]*"'
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that live outside docs/, the measured results, and the notebook as a page."""
    for path, page in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text, path, page)))
    for result in sorted((ROOT / "results").glob("*.json")):
        files.append(File.generated(config, f"results/{result.name}", abs_src_path=str(result)))
    notebook = ROOT / "docs" / NOTEBOOK
    if notebook.is_file():
        page = File.generated(config, "first_steps.md", content=notebook_page(notebook))
        files.append(page)
    files.append(File.generated(config, "site/math.woff", content=math_font()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Send the links of docs/ that leave it to where the site has those files."""
    if page.file.generated_by is not None:
        return markdown
    name = page.file.src_uri
    return site_links(markdown, f"docs/{name}", name)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """LaTeX to MathML."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2]).strip()
        try:
            mathml = convert(tex, display="block" if match[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: formula {tex!r}: {error!r}") from error
        mathml = re.sub(r"<mo>([a-z]{2,})</mo>", r"<mi>\1</mi>", mathml)  # softmax, a name
        mathml = mathml.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
        mathml = _LOG_AFTER.sub(_THIN, _LOG_BEFORE.sub(r"\1" + _THIN, mathml))
        return f'<{match[1]} class="formula">{mathml}</{match[1]}>'

    return _FORMULA.sub(formula, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse what a browser would fetch from a network."""
    found = _FOREIGN.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from a network: {found[0]}")
    return output


def math_font() -> bytes:
    """Letters and signs of STIX Two Math (SIL Open Font License), which comes with ziamath.

    A browser needs a font with a MATH table for large sums and brackets, and many readers have none.
    """
    path = package_files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    font = TTFont(io.BytesIO(path.read_bytes()), recalcTimestamp=False)
    chosen = subset.Subsetter(subset.Options(notdef_outline=True, layout_features=["ssty", "dtls"]))
    ranges = ((0x20, 0x7F), (0xA0, 0x100), (0x2C6, 0x2DE), (0x300, 0x340), (0x391, 0x3F6))
    signs = ((0x2010, 0x2060), (0x20D0, 0x20E0), (0x2100, 0x2300), (0x27E8, 0x27EC))
    italic = ((0x1D434, 0x1D468), (0x1D6E2, 0x1D71C))
    chosen.populate(unicodes=[u for low, high in ranges + signs + italic for u in range(low, high)])
    chosen.subset(font)
    font.flavor = "woff"
    written = io.BytesIO()
    font.save(written)
    return written.getvalue()


def site_links(text: str, path: str, page: str) -> str:
    """Relative links of a file of the repository, as the site's page needs them.

    Args:
        text: Markdown.
        path: of the file in the repository.
        page: of the site, where its text goes.
    """

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if joined == "results":
            joined = "results/README.md"
        if joined == f"docs/{NOTEBOOK}":
            joined = "docs/first_steps.md"
        place = OUTSIDE.get(joined, joined.removeprefix("docs/"))
        return match[1] + posixpath.relpath(place, posixpath.dirname(page) or ".") + match[3]

    return _LINK.sub(moved, text)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: texts, code, and the outputs that are text or pictures."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += filter(None, map(_output, cell.outputs))
    return site_links("\n\n".join(parts) + "\n", f"docs/{NOTEBOOK}", "first_steps.md")


def _output(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text else ""
