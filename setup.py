"""The README as a package index can show it; everything else stands in setup.cfg."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?://|#)(?P<path>[^)\s]+)\)")


def source_address() -> str | None:
    """``Source`` of project_urls in setup.cfg, such as https://github.com/OWNER/NAME, if there is one."""
    parser = configparser.ConfigParser()
    parser.read(HERE / "setup.cfg", encoding="utf-8")
    lines = parser["metadata"].get("project_urls", "").strip().splitlines()
    urls = dict(map(str.strip, line.split("=", 1)) for line in lines)
    return urls.get("Source")


def long_description(readme: str, address: str | None) -> str:
    """The README without relative links, which lead nowhere on a package index.

    Args:
        readme: Markdown.
        address: of the repository, to which relative links are joined. Without one a link becomes its text
            with the path behind it, and a picture is left out.
    """

    def absolute(link: re.Match[str]) -> str:
        text, path = link["text"], link["path"]
        if address is not None:
            kind = "raw" if link["picture"] else "blob"
            return f"{link['picture']}[{text}]({address.rstrip('/')}/{kind}/main/{path})"
        if link["picture"]:
            return ""
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(absolute, readme))


if __name__ == "__main__":
    from setuptools import setup

    text = (HERE / "README.md").read_text(encoding="utf-8")
    setup(long_description=long_description(text, source_address()))
