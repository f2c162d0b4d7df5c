"""Measure this project: ``scripts/benchmark.py TOPIC [key=value ...]``; ``--help`` says more."""

from __future__ import annotations

import sys

from dinovmf_plugin.benchmarks import topics


def main(argv: list[str] | None = None) -> None:
    """Run one topic, or print help."""
    topics.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
