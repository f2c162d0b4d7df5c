"""The command line of the benchmarks: which topics there are, and their help."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from dinovmf_plugin.benchmarks.settings import TOPIC_SETTINGS
from dinovmf_plugin.runs.cli import one_clear_message
from dinovmf_plugin.runs.reference import keys_of, text_table

__all__ = ["TOPICS", "describe", "main"]

TOPICS = {
    "loss": "last layer and loss beside lightly, the official per-pair formula and the bare products",
    "step": "a whole training step beside lightly's loop and solo-learn's DINO",
    "growth": "time and memory against prototypes, batch and kNN bank, with slopes",
    "gpu": "everything that wants a GPU, in one command of at most 8 minutes",
    "data": "the two loaders",
    "feed": "the step with and without loading",
    "memory": "iBOT's loss beside one that stores all patch logits",
    "knn": "the kNN evaluation beside faiss",
    "mixture": "the vMF mixture beside a public one and Gaussian mixtures",
    "transfer": "the cross-validated regression",
}


def _overview() -> str:
    lines = [f"  {name:10s}{about}" for name, about in TOPICS.items()]
    return (
        "python scripts/benchmark.py TOPIC [key=value ...]\n"
        "python scripts/benchmark.py TOPIC --help\n\n" + "\n".join(lines)
    )


def _module(topic: str) -> ModuleType:
    return importlib.import_module(f"dinovmf_plugin.benchmarks.{topic}")


def describe(topic: str) -> str:
    """What a topic measures, and its keys with types, bounds, defaults and help.

    Example:
        >>> text = describe("memory")
        >>> "batch=64" in text, "local crops, besides two global ones" in text
        (True, True)
    """
    keys = text_table(keys_of(TOPIC_SETTINGS[topic]))
    title = "Keys, with their defaults (write lists with commas: key=1,2):"
    return f"{inspect.getdoc(_module(topic))}\n\n{title}\n{keys}"


@one_clear_message
def main(argv: list[str]) -> None:
    """Run one topic, or print help; what is refused is said in one sentence.

    Args:
        argv: a topic and its ``key=value`` arguments; ``--help`` alone or after a topic.

    Raises:
        SystemExit: with status 2, for an unknown topic and for what a topic refuses.
    """
    topic, *rest = argv or [""]
    asked = {"-h", "--help", "help"}
    if topic in asked:
        print(_overview())
    elif topic not in TOPICS:
        raise ValueError(f"benchmark {topic!r} is unknown: choose one of {', '.join(TOPICS)}")
    elif asked & set(rest):
        print(describe(topic))
    else:
        _module(topic).main(rest)
