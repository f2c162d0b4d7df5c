"""Parts of a page as HTML, from the templates beside this file."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from dinovmf_plugin.report.numbers import shown

__all__ = ["render", "render_page"]


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dinovmf_plugin.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["shown"] = shown
    return environment


def render(part: str, content: object) -> str:
    """One part, every value escaped.

    Args:
        part: name of a macro in ``parts.html.j2``.
        content: what it shows.

    Example:
        >>> render("text", {"text": "a < b", "note": False})
        '<p>a &lt; b</p>'
    """
    macro = getattr(_environment().get_template("parts.html.j2").module, part)
    return str(macro(content))


def render_page(page: object) -> str:
    """The whole page; its parts are HTML already."""
    return _environment().get_template("page.html.j2").render(page=page)
