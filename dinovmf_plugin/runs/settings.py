"""Settings from a config: unknown keys and values of the wrong type in one sentence."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["build", "check_type", "check_types"]

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "text"),
    type(None): ("null", "null"),
    Mapping: ("a group of keys", "groups of keys"),
}
_KINDS: dict[Any, Any] = {int: Integral, float: Real, str: (str, os.PathLike)}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: object, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if kind in (list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_fits(item, get_args(hint)[0]) for item in value)  # type: ignore[attr-defined]
    if kind not in _WORDS:
        return True  # names to choose from, which the settings' own check knows
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, _KINDS.get(kind, kind))


def _words(hint: Any, plural: int = 0) -> str:
    if _is_union(hint):
        return " or ".join(_words(part, plural) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if kind in (list, Sequence):
        return f"a list of {_words(get_args(hint)[0], plural=1)}"
    return _WORDS[kind][plural]


def check_type(key: str, value: object, hint: Any) -> None:
    """Refuses a value that is not of the type ``hint``.

    A whole number is a number, a path is text; true and false are neither. What is no number, text,
    null, list or mapping in ``hint`` accepts anything.

    Raises:
        ValueError: naming the key, the value and what would be right.

    Example:
        >>> check_type("knn.ks", 10, Sequence[int])
        Traceback (most recent call last):
        ValueError: knn.ks=10 must be a list of whole numbers: [10]
    """
    if _fits(value, hint):
        return
    as_list = f": [{value}]" if _fits([value], hint) else ""
    raise ValueError(f"{key}={value!r} must be {_words(hint)}{as_list}")


def check_types(settings: Any, prefix: str = "") -> None:
    """``check_type`` for every field of a dataclass; ``prefix`` stands before their names."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        check_type(f"{prefix}{field.name}", getattr(settings, field.name), hints[field.name])


def build(kind: Any, values: object, prefix: str) -> Any:
    """A settings dataclass from plain containers.

    Args:
        kind: the dataclass.
        values: its fields by name.
        prefix: of their names in messages, such as ``knn.``.

    Raises:
        ValueError: for an unknown key or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.removesuffix('.')}={values!r} must be a group of keys")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}: choose from {sorted(known)}")
    settings = kind(**values)
    check_types(settings, prefix)
    return settings
