"""A fit needs a few chunks beside the data, whatever the number of rows."""

from __future__ import annotations

import pytest

from dinovmf_plugin.benchmarks.harness import in_own_process
from dinovmf_plugin.mixture.em import chunk_rows
from dinovmf_plugin.mixture.initialization import initialization_rows


@pytest.fixture(autouse=True)
def exact_allocator(monkeypatch):
    """What is freed goes back at once: else the C library's arenas add 10 to 80 MB, by chance."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")


def growth(rows: int, dim: int, num: int, passes: int) -> int:
    """Bytes by which a fit of so many passes grows a fresh process; the rows are there before."""
    module = "dinovmf_plugin.benchmarks.mixture"
    return int(in_own_process(module, "peak_memory", rows, dim, num, "ours", passes))


def bound(dim: int, num: int) -> int:
    """Six chunks with their scores, six float32 copies of the start's rows, twenty sets of parameters."""
    chunk = 4 * chunk_rows(num, dim) * (num + dim)
    return 6 * chunk + 6 * 4 * initialization_rows(num) * dim + 20 * 8 * num * dim


def test_fit__memory__within_the_bound():
    rows, dim, num = 120_000, 32, 260
    assert bound(dim, num) < 4 * rows * num  # the responsibilities of all rows in float32
    assert growth(rows, dim, num, 1) < bound(dim, num)


@pytest.mark.slow
def test_fit__a_million_rows_and_4096_components__within_8_gb():
    rows, dim, num = 1_000_000, 256, 4096
    assert 4 * rows * dim + bound(dim, num) < 8e9
    assert growth(rows, dim, num, 1) < bound(dim, num)
