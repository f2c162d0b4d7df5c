"""Every key of a settings class: what it takes, its default and its help, as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinovmf_plugin.runs.bounds import in_words
from dinovmf_plugin.runs.settings import Settings, plain, settings_of

__all__ = ["Key", "default_values", "keys_of", "markdown_table", "text_table"]


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: with its groups, such as ``knn.ks``.
        takes: type and bounds in words.
        default: plain; None for a key that must be given.
        required: whether it must be given.
        help: one line.
    """

    name: str
    takes: str
    default: Any
    required: bool
    help: str


def keys_of(
    kind: type[Settings], prefix: str = "", defaults: Mapping[str, Any] | None = None
) -> list[Key]:
    """Every key of a settings class, groups opened, in order.

    Args:
        kind: the settings class.
        prefix: before every name, such as ``method_kwargs.``.
        defaults: values by name that stand in place of the class's own.
    """
    found = []
    for name, setting in settings_of(kind).items():
        default = setting.default
        if setting.group is not None:
            own = {
                inner: getattr(default, inner)
                for inner in settings_of(setting.group)
                if dataclasses.is_dataclass(default)
            }
            found += keys_of(setting.group, f"{prefix}{name}.", own)
            continue
        default = (defaults or {}).get(name, default)
        required = default is dataclasses.MISSING
        value = None if required else plain(default)
        value = list(value) if isinstance(value, tuple) else value
        takes = in_words(setting.hint)
        found.append(Key(f"{prefix}{name}", takes, value, required, setting.help))
    return found


def default_values(kind: type[Settings]) -> dict[str, Any]:
    """Every key's default as a config has it: groups nested, null for what must be given."""
    values: dict[str, Any] = {}
    for key in keys_of(kind):
        *groups, name = key.name.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = key.default
    return values


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown_table(keys: list[Key]) -> str:
    """The keys as a Markdown table.

    Example:
        >>> print(markdown_table([Key("knn.k", "a whole number of at least 1", 10, False, "neighbors")]))
        | key | takes | default | |
        | --- | --- | --- | --- |
        | `knn.k` | a whole number of at least 1 | `10` | neighbors |
    """
    rows = ["| key | takes | default | |", "| --- | --- | --- | --- |"]
    for key in keys:
        default = "required" if key.required else f"`{json.dumps(key.default)}`"
        rows.append(f"| `{key.name}` | {_cell(key.takes)} | {default} | {_cell(key.help)} |")
    return "\n".join(rows)


def text_table(keys: list[Key]) -> str:
    """The keys for a terminal: a line for what a key takes and its default, one for its help.

    Example:
        >>> print(text_table([Key("knn.k", "a whole number of at least 1", 10, False, "neighbors")]))
        knn.k=10  (a whole number of at least 1)
            neighbors
    """
    lines = []
    for key in keys:
        default = "REQUIRED" if key.required else json.dumps(key.default, ensure_ascii=False)
        lines.append(f"{key.name}={default}  ({key.takes})")
        if key.help:
            lines.append(f"    {key.help}")
    return "\n".join(lines)
