"""The vocabulary of settings: what a key may hold, and the same in words."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

__all__ = [
    "AtLeastOne",
    "Count",
    "Finite",
    "Fraction",
    "OneOf",
    "Path",
    "Positive",
    "Ratio",
    "Seed",
    "Share",
    "Weight",
    "Whole",
    "Words",
    "in_words",
]


@dataclasses.dataclass(frozen=True)
class Words:
    """What is right for a key, in place of the words made from its type: ``must be ...``."""

    text: str


class OneOf:
    """Names to choose from that are known only while the program runs.

    Args:
        choices: the names, or a function that gives them.
    """

    def __init__(self, choices: Iterable[str] | Callable[[], Iterable[str]]) -> None:
        self._choices = choices

    @property
    def names(self) -> list[str]:
        """All names there are."""
        return list(self._choices() if callable(self._choices) else self._choices)

    def _one(self, value: str) -> str:
        if value not in self.names:
            raise ValueError("unknown")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._one, handler(source))


Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Finite = Annotated[float, Words("a finite number")]
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Ratio = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Ge(0), Lt(1)]  # what may be left out, but not all of it
Fraction = Annotated[float, Gt(0), Le(1)]  # what may be taken, but not nothing
Path = Annotated[str, MinLen(1), Words("a path")]
AtLeastOne = MinLen(1)

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "text"),
    Any: ("anything", "anything"),
    type(None): ("null", "null"),
}


def _limits(marks: Sequence[Any]) -> str:
    low = next((m for m in marks if isinstance(m, Ge | Gt)), None)
    high = next((m for m in marks if isinstance(m, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {low.ge} to {high.le}"
    parts = []
    if low is not None:
        parts.append(f"of at least {low.ge}" if isinstance(low, Ge) else f"above {low.gt}")
    if high is not None:
        parts.append(f"at most {high.le}" if isinstance(high, Le) else f"below {high.lt}")
    return " " + " and ".join(parts) if parts else ""


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _alternatives(hint: Any, plural: bool) -> list[str]:
    """What stands between commas and "or": names to choose from, the parts of a union."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
    for mark in marks:
        if isinstance(mark, Words):
            return [mark.text]
        if isinstance(mark, OneOf):
            return mark.names
    kind = get_origin(base) or base
    if kind in (Union, types.UnionType):
        return [word for part in get_args(base) for word in _alternatives(part, plural)]
    if kind is Literal:
        return [str(value) for value in get_args(base)]
    if kind in (list, Sequence, tuple):
        count = next((m.min_length for m in marks if isinstance(m, MinLen)), 0)
        least = {0: "", 1: ", one at least"}.get(count, f", {count} at least")
        return [f"a list of {in_words(get_args(base)[0], plural=True)}{least}"]
    group = isinstance(kind, type) and (issubclass(kind, dict) or dataclasses.is_dataclass(kind))
    if kind is Mapping or group:
        return ["groups of keys" if plural else "a group of keys"]
    if kind is str and any(isinstance(mark, MinLen) for mark in marks):
        return ["text that is not empty"]
    return [_WORDS[kind][plural] + _limits(marks)]


def in_words(hint: Any, plural: bool = False) -> str:
    """What a type with its bounds takes.

    Example:
        >>> in_words(Share), in_words(Sequence[Positive])
        ('a number of at least 0 and below 1', 'a list of numbers above 0')
        >>> in_words(Literal["webp", "gif"] | None)
        'webp, gif or null'
    """
    return _any_of(_alternatives(hint, plural))
