"""A griffe extension: docstrings as griffe and Markdown want them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

_SECTION = re.compile(r"(?m)^Example:$")
_SESSION = re.compile(r"(?m)^(?<!```pycon\n)>>> .*(?:\n.+)*")
_TABLE = re.compile(r"(?ms)^(={3,}[ =]*)\n.*?\n\1\n.*?\n\1$")


class Doctests(Extension):
    """``Example:`` becomes a section; sessions outside of one and reStructuredText's tables, code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Of every class, function and attribute that was read."""
        _mend(obj)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Modules have their docstring later than ``on_object``."""
        _mend(pkg)


def _mend(obj: Object) -> None:
    if obj.docstring is None:
        return
    text = _SECTION.sub("Examples:", obj.docstring.value)
    text = _SESSION.sub(r"```pycon\n\g<0>\n```", text)
    obj.docstring.value = _TABLE.sub(r"```text\n\g<0>\n```", text)
