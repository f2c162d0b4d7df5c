"""Mutated recipes: each trains a step, or is refused by one sentence that names the key."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from dinovmf_plugin.pretraining import pretrain
from dinovmf_plugin.runs.cli import is_expected
from tests.small_demo import small_demo

METHODS = ["dino_multicrop", "dino_vmf", "ibot", "ibot_vmf", "msn", "msn_vmf"]

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    -0.5,
    1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e30,
    "",
    "abc",
    "1e-3",
    "../x",
    "${nothing.here}",
    [],
    [1],
    ["a", "b"],
    [0.5, 0.1, 0.2],
    {},
    {"a": 1},
]


class OneStep(Callback):
    """Ends training in the second step."""

    class Done(Exception):
        pass

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step:
            raise self.Done

    def on_train_epoch_end(self, trainer, module) -> None:
        raise self.Done


def _nodes(cfg: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and list entries, the inner ones too."""
    items = (
        cfg.items() if isinstance(cfg, dict) else enumerate(cfg) if isinstance(cfg, list) else ()
    )
    found = []
    for key, value in items:
        found += [(*path, key), *_nodes(value, (*path, key))]
    return found


def _at(cfg: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        cfg = cfg[key]
    return cfg


def _misspell(rng: random.Random, word: str) -> str:
    i = rng.randrange(len(word))
    return rng.choice([word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word + "s"])


def _mutate(rng: random.Random, cfg: Any) -> tuple[str, list[str]]:
    """Change ``cfg``; returns what was done and the words of which an error must name one."""
    if rng.random() < 0.08:
        kwargs = cfg["method_kwargs"]
        a, b = rng.sample([key for key in kwargs if key.endswith("temperature")], 2)
        kwargs[a], kwargs[b] = kwargs[b], kwargs[a]
        return f"swap {a} and {b}", [a, b]
    path = rng.choice(_nodes(cfg))
    *parents, key = path
    node = _at(cfg, tuple(parents))
    words = [str(x) for x in path if isinstance(x, str)][-2:]
    kind = rng.random()
    if kind < 0.15 and isinstance(node, dict):
        words += [str(x) for x in _nodes(node[key]) for x in x]
        del node[key]
        return f"delete {path}", words
    if kind < 0.25 and isinstance(key, str):
        wrong = _misspell(rng, key)
        node[wrong] = node.pop(key)
        return f"rename {path} to {wrong}", [*words, wrong]
    value = copy.deepcopy(rng.choice(VALUES))
    if isinstance(node[key], dict):
        words += list(node[key])
    node[key] = value
    return f"{path} = {value!r}", words


@pytest.fixture(scope="module")
def recipes(pictures: Path) -> dict[str, Any]:
    """A tiny recipe of every method as plain containers."""
    made = {}
    for method in METHODS:
        given = [
            f"method={method}",
            f"data.train_path={pictures}",
            f"data.val_path={pictures}",
            "max_epochs=2",
            "scheduler.warmup_epochs=1",
        ]
        if method.startswith("msn"):
            dinos = ("warmup_teacher_temperature", "warmup_teacher_temperature_epochs")
            given += [f"~method_kwargs.{key}" for key in dinos]
        made[method] = OmegaConf.to_container(small_demo(*given))
    return made


def _outcome(seed: int, recipes: dict[str, Any], folder: Path) -> str | None:
    """None if the mutated recipe behaves, else what went wrong."""
    rng = random.Random(seed)
    cfg = copy.deepcopy(recipes[rng.choice(METHODS)])
    cfg["checkpoint"]["dir"] = str(folder)
    done, words = zip(*(_mutate(rng, cfg) for _ in range(rng.choice([1, 1, 1, 2]))), strict=True)
    what = f"seed {seed}, {cfg.get('method')}: {'; '.join(done)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pretrain(OmegaConf.create(cfg), callbacks=[OneStep()])
    except OneStep.Done:
        return None
    except Exception as error:
        message = str(error)
        named = any(word in message for group in words for word in group)
        if is_expected(error) and named and "\n" not in message.strip():
            return None
        return f"{what}\n    {type(error).__module__}.{type(error).__name__}: {message}"
    return None if any("max_epochs" in x for x in done) else f"{what}\n    trained no step"


def _check(seeds: range, recipes: dict[str, Any], folder: Path) -> None:
    found = [x for x in (_outcome(seed, recipes, folder) for seed in seeds) if x]
    assert not found, "\n".join([f"{len(found)} of {len(seeds)}", *found])


def test_mutated_recipes__train_or_name_the_key(recipes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _check(range(60), recipes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_mutated_recipes__hundreds__train_or_name_the_key(block, recipes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _check(range(1000 + 100 * block, 1100 + 100 * block), recipes, tmp_path)
