"""Measurements behind ``scripts/benchmark.py``: one module with a ``main(argv)`` per topic."""
