"""The one reader of settings: types, bounds and help stand with each key, once.

pydantic checks every field of a plain frozen dataclass. ``OmegaConf.structured`` has no bounds, no
``Literal``, no unions of a number and a list, and takes nan; its part here is hydra's alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import Doc

from dinovmf_plugin.runs.bounds import in_words

__all__ = ["Doc", "Setting", "Settings", "plain", "read", "read_arguments", "settings_of"]


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def plain(value: Any) -> Any:
    """A value with the types of JSON: hydra's containers, numpy's numbers and paths converted.

    Raises:
        ValueError: for an interpolation of hydra's that cannot be resolved.
    """
    if isinstance(value, DictConfig | ListConfig):
        try:
            return OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"{error.full_key} cannot be resolved: {reason}") from error
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _has_no_end(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_no_end, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_no_end, value))
    return isinstance(value, float) and not math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a settings class.

    Attributes:
        name: the field's name.
        hint: its type, with ``Annotated`` bounds.
        default: what it is when it is left out; ``dataclasses.MISSING`` if it must be given.
        help: one line about it.
        group: the settings class, if it is a group of keys.
    """

    name: str
    hint: Any
    default: Any
    help: str
    group: type[Settings] | None

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.hint, config=_STRICT)

    def _fits(self, value: Any) -> bool:
        try:
            self._adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    def check(self, value: Any) -> Any:
        """The value in its declared type.

        Raises:
            ValueError: naming the key, the value and what would be right.
        """
        if self.group is not None:
            if isinstance(value, self.group):
                return value
            return read(self.group, {} if value is None else value, f"{self.name}.")
        value = plain(value)
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            right = in_words(self.hint)
            if _has_no_end(value):
                right = right.replace("a number", "a finite number").replace(
                    "list of numbers", "list of finite numbers"
                )
            as_list = f": [{value}]" if self._fits([value]) else ""
            verb = "be set to" if value is None else "be"
            raise ValueError(f"{self.name}={value!r} must {verb} {right}{as_list}") from None

    def parse(self, text: str) -> Any:
        """The value that a text stands for: commas separate a list; no text is an empty list or null.

        Raises:
            ValueError: naming the key, the text and what would be right.
        """
        for value in (text, text.split(",")) if text else (text, [], None):
            try:
                return self._adapter.validate_python(value, strict=False)
            except ValidationError:
                continue
        raise ValueError(f"{self.name}={text} must be {in_words(self.hint)}")


_KNOWN: dict[type[Settings], dict[str, Setting]] = {}


def settings_of(kind: type[Settings]) -> dict[str, Setting]:
    """Every key of a settings class by name, in order."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        base, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        group = base if isinstance(base, type) and issubclass(base, Settings) else None
        text = next((m.documentation for m in marks[::-1] if isinstance(m, Doc)), "")
        found[field.name] = Setting(field.name, hint, default, text, group)
    return _KNOWN.setdefault(kind, found)


class Settings:
    """Base of all settings, frozen dataclasses of which every instance has been checked.

    A field's type is what it may hold (``Count``, ``Share | None``, ``Sequence[Positive]``,
    ``Literal["teacher", "student"]``), a ``Doc`` its help, another settings class a group of keys.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right. nan and inf are
            outside all bounds.

    Example:
        >>> from dinovmf_plugin.runs.bounds import Count, Positive
        >>> keys = [("ks", Sequence[Count], (10, 20)), ("temperature", Positive, 0.07)]
        >>> Knn = dataclasses.make_dataclass("Knn", keys, bases=(Settings,), frozen=True)
        >>> Knn(temperature=float("nan"))
        Traceback (most recent call last):
        ValueError: temperature=nan must be a finite number above 0
        >>> read(Knn, {"ks": 10}, "knn.")
        Traceback (most recent call last):
        ValueError: knn.ks=10 must be a list of whole numbers of at least 1: [10]
        >>> read(Knn, {"temprature": 1}, "knn.")
        Traceback (most recent call last):
        ValueError: knn.temprature is no known key: did you mean temperature?
    """

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            object.__setattr__(self, name, setting.check(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Rules between keys; what one key alone may hold is its type's.

        Raises:
            ValueError: a sentence that begins with a key.
        """


SettingsT = TypeVar("SettingsT", bound=Settings)


def read(kind: type[SettingsT], values: object, prefix: str = "") -> SettingsT:
    """Settings from a config.

    Args:
        kind: the settings class.
        values: its fields by name: a mapping, plain or hydra's. Groups may be left out or null.
        prefix: of the keys in messages, such as ``knn.``.

    Raises:
        ValueError: for an unknown key, a wrong type or a value out of bounds, in one sentence.
    """
    values = plain(values)
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.removesuffix('.')}={values!r} must be a group of keys")
    known = settings_of(kind)
    for key in map(str, values):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"
            raise ValueError(f"{prefix}{key} is no known key: {hint}")
    required = {name: None for name, s in known.items() if s.default is dataclasses.MISSING}
    try:
        return kind(**(required | values))
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def read_arguments(kind: type[SettingsT], arguments: Sequence[str]) -> SettingsT:
    """Settings from ``key=value`` arguments, for commands that do without hydra.

    Args:
        kind: the settings class, without groups.
        arguments: such as ``["ks=10,20", "output=a.json"]``; of two with the same key the last one counts.

    Raises:
        ValueError: for an argument that is no ``key=value``, and as ``read``.

    Example:
        >>> from dinovmf_plugin.runs.bounds import Count
        >>> keys = [("ks", Sequence[Count], (10, 20)), ("memory", bool, True)]
        >>> Knn = dataclasses.make_dataclass("Knn", keys, bases=(Settings,), frozen=True)
        >>> read_arguments(Knn, ["ks=10,200", "memory=0"])
        Knn(ks=[10, 200], memory=False)
        >>> read_arguments(Knn, ["ks=0"])
        Traceback (most recent call last):
        ValueError: ks=0 must be a list of whole numbers of at least 1
    """
    known = settings_of(kind)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{argument} must be key=value with one of {', '.join(known)}")
        values[key] = known[key].parse(text) if key in known else text
    return read(kind, values)
