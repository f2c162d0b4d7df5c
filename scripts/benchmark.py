"""Measure this project: ``scripts/benchmark.py TOPIC [key=value ...]``; see ``TOPICS``."""

from __future__ import annotations

import importlib
import importlib.util
import sys

TOPICS = ("loss", "data", "feed", "step", "memory", "knn", "mixture", "transfer")


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments to ``dinovmf_plugin.benchmarks.<topic>.main``, imported only now."""
    topic, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    module = f"dinovmf_plugin.benchmarks.{topic}"
    if topic not in TOPICS or importlib.util.find_spec(module) is None:
        there = [t for t in TOPICS if importlib.util.find_spec(f"dinovmf_plugin.benchmarks.{t}")]
        sys.exit(f"benchmark {topic!r} is unknown: choose one of {', '.join(there)}")
    try:
        importlib.import_module(module).main(rest)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"benchmark {topic}: {error}")


if __name__ == "__main__":
    main()
