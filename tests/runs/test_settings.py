"""The one reader of settings, and every settings class of the project held to its own bounds."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt
from omegaconf import OmegaConf

import dinovmf_plugin
from dinovmf_plugin.runs.bounds import (
    AtLeastOne,
    Count,
    Fraction,
    OneOf,
    Positive,
    Share,
    Words,
    in_words,
)
from dinovmf_plugin.runs.bounds import Path as FilePath
from dinovmf_plugin.runs.settings import Doc, Settings, read, read_arguments, settings_of


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    share: Annotated[Share, Doc("left out")] = 0.0
    low: Annotated[Count, Doc("smallest")] = 1
    high: Annotated[Count, Doc("largest")] = 9

    def check(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low={self.low} must be at most high={self.high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    checkpoint: Annotated[FilePath, Doc("weights")]
    ks: Annotated[Sequence[Count], AtLeastOne, Doc("neighbors")] = (10, 20)
    lr: Annotated[Positive | Sequence[Positive], Doc("learning rates")] = 0.1
    animation: Annotated[Literal["webp", "gif"] | None, Doc("format")] = "webp"
    method: Annotated[str, OneOf(lambda: ["dino", "ibot"]), Doc("method")] = "dino"
    fraction: Annotated[Fraction | Literal[-1], Doc("share; -1: all")] = -1
    on: Annotated[bool, Doc("switch")] = True
    inner: Inner = dataclasses.field(default_factory=Inner)


BAD = {
    "ks=10 must be a list of whole numbers of at least 1, one at least: [10]": {"ks": 10},
    "ks=[] must be a list of whole numbers of at least 1, one at least": {"ks": []},
    "ks=[1.5] must be a list of whole numbers of at least 1, one at least": {"ks": [1.5]},
    "ks='12' must be a list of whole numbers of at least 1, one at least": {"ks": "12"},
    "lr=0 must be a number above 0 or a list of numbers above 0": {"lr": 0},
    "lr=nan must be a finite number above 0 or a list of finite numbers above 0": {"lr": math.nan},
    "animation='mp4' must be webp, gif or null": {"animation": "mp4"},
    "method='byol' must be dino or ibot": {"method": "byol"},
    "fraction=0 must be a number above 0 and at most 1 or -1": {"fraction": 0},
    "on=1 must be true or false": {"on": 1},
    "checkpoint=None must be set to a path": {"checkpoint": None},
    "checkpoint='' must be a path": {"checkpoint": ""},
    "checkpoint=7 must be a path": {"checkpoint": 7},
    "inner=3 must be a group of keys": {"inner": 3},
    "inner.share=1 must be a number of at least 0 and below 1": {"inner": {"share": 1}},
    "inner.share=True must be a number of at least 0 and below 1": {"inner": {"share": True}},
    "inner.low=5 must be at most high=2": {"inner": {"low": 5, "high": 2}},
    "inner.lwo is no known key: did you mean low?": {"inner": {"lwo": 1}},
    "chekpoint is no known key: did you mean checkpoint?": {"chekpoint": "x"},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_value__one_sentence(sentence):
    with pytest.raises(ValueError) as caught:
        read(Outer, {"checkpoint": "x", **BAD[sentence]}, "a.")
    assert str(caught.value) == f"a.{sentence}"


def test_unknown_key_like_no_other__known_ones_listed():
    with pytest.raises(
        ValueError, match=r"^a\.xyzzy is no known key: known keys are share, low, high$"
    ):
        read(Inner, {"xyzzy": 1}, "a.")


def test_direct_construction_and_changes__are_checked_too():
    with pytest.raises(ValueError, match=r"^share=nan must be a finite number"):
        Inner(share=math.nan)
    with pytest.raises(ValueError, match=r"^low=10 must be at most high=9$"):
        dataclasses.replace(Inner(), low=10)


def test_values__of_hydra_numpy_and_paths():
    config = OmegaConf.create({"checkpoint": "${inner.low}.ckpt", "inner": {"low": 4}})
    assert read(Outer, config) == Outer(checkpoint="4.ckpt", inner=Inner(low=4))
    found = read(
        Outer, {"checkpoint": Path("a") / "b", "ks": range(1, 3), "lr": tuple(np.array([0.5, 1]))}
    )
    assert (found.checkpoint, list(found.ks), found.lr) == ("a/b", [1, 2], (0.5, 1.0))
    assert type(read(Inner, {"low": np.int64(3)}).low) is int
    assert type(read(Outer, {"checkpoint": "x", "lr": 3}).lr) is float
    assert read(Outer, {"checkpoint": "x", "inner": None}).inner == Inner()


def test_interpolation_without_a_target__named():
    with pytest.raises(ValueError, match=r"checkpoint cannot be resolved: .*nowhere"):
        read(Outer, OmegaConf.create({"checkpoint": "${nowhere}"}))


# ---- every settings class of the project ---------------------------------------------------------


def _subclasses(kind: type) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _all_settings() -> list[type[Settings]]:
    package = Path(dinovmf_plugin.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if "runs.settings import" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
    kinds = {kind for kind in _subclasses(Settings) if kind.__module__.startswith("dinovmf_plugin")}
    return sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))


KINDS = _all_settings()
KEYS = [
    pytest.param(kind, setting, id=f"{kind.__module__.split('.', 1)[1]}.{kind.__name__}.{name}")
    for kind in KINDS
    for name, setting in settings_of(kind).items()
    if setting.group is None and name in vars(kind).get("__annotations__", {})  # not inherited
]


def _marks(hint: Any) -> Iterator[Any]:
    """Everything that stands in a type, at any depth."""
    yield hint
    for part in get_args(hint):
        yield from _marks(part)


def _is_numeric(hint: Any) -> bool:
    return int in _marks(hint) or float in _marks(hint)


def _just_outside(hint: Any) -> Iterator[float]:
    whole = float not in _marks(hint)
    for mark in _marks(hint):
        if isinstance(mark, Gt | Lt):
            yield mark.gt if isinstance(mark, Gt) else mark.lt
        elif isinstance(mark, Ge | Le):
            edge = mark.ge if isinstance(mark, Ge) else mark.le
            sign = -1 if isinstance(mark, Ge) else 1
            yield edge + sign if whole else math.nextafter(edge, sign * math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told(Settings):
    names: Annotated[Sequence[Literal["a", "b c"]], AtLeastOne] = ("a",)
    sizes: Sequence[Count] = (1, 2)
    share: Share = 0.5
    whole: bool = True
    free: str = "x"
    path: FilePath | None = None


def test_read_arguments__text_by_the_type_of_its_key():
    assert read_arguments(Told, []) == Told()
    argv = ["names=a,b c", "--sizes=", "share=1e-3", "whole=0", "free=a=1,b", "path=a,b.json"]
    told = read_arguments(Told, argv)
    assert told.names == ["a", "b c"]
    assert told.sizes == []
    assert (told.share, told.whole, told.free, told.path) == (1e-3, False, "a=1,b", "a,b.json")
    assert read_arguments(Told, ["sizes=16", "path=b", "path="]) == Told(sizes=[16], path=None)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("names=", "names= must be a list of a or b c, one at least"),
        ("names=a,c", "names=a,c must be a list of a or b c, one at least"),
        ("sizes=1,,2", "sizes=1,,2 must be a list of whole numbers of at least 1"),
        ("sizes=1.5", "sizes=1.5 must be a list of whole numbers of at least 1"),
        ("share=1", "share=1 must be a number of at least 0 and below 1"),
        ("share=nan", "share=nan must be a number of at least 0 and below 1"),
        ("whole=maybe", "whole=maybe must be true or false"),
        ("share", "share must be key=value with one of names, sizes, share, whole, free, path"),
        ("shares=1", "shares is no known key: did you mean share?"),
    ],
)
def test_read_arguments__what_is_wrong_is_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as caught:
        read_arguments(Told, [argument])
    assert str(caught.value) == sentence


def test_settings_are_found():
    assert "AnalysisSettings" in {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize(("kind", "setting"), KEYS)
def test_every_key__explains_itself_in_one_line(kind, setting):
    assert setting.help, f"{kind.__name__}.{setting.name} has no Doc"
    assert "\n" not in setting.help
    assert in_words(setting.hint)


@pytest.mark.parametrize(("kind", "setting"), KEYS)
def test_every_default__is_a_value_that_may_be_given(kind, setting):
    if setting.default is not dataclasses.MISSING:
        setting.check(setting.default)


@pytest.mark.parametrize(
    ("kind", "setting"), [key for key in KEYS if _is_numeric(key.values[1].hint)]
)
def test_every_number__refuses_nan_inf_and_what_is_just_outside(kind, setting):
    outside = list(_just_outside(setting.hint))
    assert outside or Words("a finite number") in _marks(setting.hint), "no bounds"
    for value in (math.nan, math.inf, -math.inf, *outside):
        for given in (value, [value], {"a": value}):
            with pytest.raises(ValueError) as caught:
                setting.check(given)
            assert str(caught.value).startswith(f"{setting.name}={given!r} must be ")
