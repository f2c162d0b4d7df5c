"""The command line of the benchmarks: which topics there are, and their help."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from types import ModuleType

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
_KEY = re.compile(r'^    "(\w+)": (.+?),(?:\s*# (.*))?$', re.MULTILINE)


def _overview() -> str:
    lines = [f"  {name:10s}{about}" for name, about in TOPICS.items()]
    return (
        "python scripts/benchmark.py TOPIC [key=value ...]\n"
        "python scripts/benchmark.py TOPIC --help\n\n" + "\n".join(lines)
    )


def describe(module: ModuleType) -> str:
    """What a topic measures, and its keys with defaults and remarks.

    Example:
        >>> from dinovmf_plugin.benchmarks import memory
        >>> text = describe(memory)
        >>> "batch=64" in text, "local crops, besides two global ones" in text
        (True, True)
    """
    source = inspect.getsource(module)
    remarks = {key: remark for key, _, remark in _KEY.findall(source[source.index("DEFAULTS") :])}
    keys = [
        f"  {f'{key}={value}':34s} {remarks.get(key, '')}".rstrip()
        for key, value in module.DEFAULTS.items()
    ]
    return "\n".join([inspect.getdoc(module) or "", "", "Keys, with their defaults:", *keys])


def main(argv: list[str]) -> None:
    """Run one topic, or print help.

    Args:
        argv: a topic and its ``key=value`` arguments; ``--help`` alone or after a topic.

    Raises:
        SystemExit: for an unknown topic, and with one sentence for what a topic refuses.
    """
    topic, *rest = argv or [""]
    asked = {"-h", "--help", "help"}
    if topic in asked:
        print(_overview())
        return
    if topic not in TOPICS:
        sys.exit(f"benchmark {topic!r} is unknown: choose one of {', '.join(TOPICS)}")
    module = importlib.import_module(f"dinovmf_plugin.benchmarks.{topic}")
    if asked & set(rest):
        print(describe(module))
        return
    try:
        module.main(rest)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"benchmark {topic}: {error}")
