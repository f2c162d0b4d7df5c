"""Greedy cover and components against naive float64 loops; the synthetic void set of the paper's B/16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csgraph
from torch.nn import functional as F

from dinovmf_plugin.mixture.utilization import (
    component_groups,
    duplicate_groups,
    utilization,
    void_set,
)


def naive_cover(directions, threshold):
    unit = F.normalize(directions.double(), dim=-1)
    cosine = (unit @ unit.T).tolist()
    groups, found = [-1] * len(unit), 0
    for i in range(len(unit)):
        if groups[i] >= 0:
            continue
        for j in range(i, len(unit)):
            if groups[j] < 0 and (j == i or cosine[i][j] > threshold):
                groups[j] = found
        found += 1
    return groups


def clusters(num, centers, dim, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    base = F.normalize(torch.randn(centers, dim, generator=generator), dim=-1)
    pick = torch.randint(centers, (num,), generator=generator)
    points = base[pick] + noise * torch.randn(num, dim, generator=generator) / dim**0.5
    return points * (0.1 + 5 * torch.rand(num, 1, generator=generator))  # norms must not matter


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.975])
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6, 1.2])
def test_duplicate_groups__equal_the_naive_loop(noise, threshold):
    points = clusters(700, 40, 24, noise, seed=int(100 * noise))
    assert duplicate_groups(points, threshold).tolist() == naive_cover(points, threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("noise", [0.3, 0.45, 0.6])
def test_component_groups__equal_scipy_on_the_full_graph(noise, threshold):
    points = clusters(700, 40, 24, noise, seed=1)
    unit = F.normalize(points.double(), dim=-1)
    count, expected = csgraph.connected_components((unit @ unit.T > threshold).numpy())
    found = component_groups(points, threshold).numpy()
    assert found.max() + 1 == count
    # the same partition: every pair of labels occurs together only
    assert len(np.unique(np.stack([found, expected]), axis=1).T) == count
    first = np.unique(found, return_index=True)[1]
    assert (np.diff(first) > 0).all()


def test_component_groups__chains_merge_what_the_cover_separates():
    angles = torch.linspace(0, 3, 600)
    points = torch.stack([angles.cos(), angles.sin(), torch.zeros(600)], dim=-1)
    assert utilization(points, [0.99], method="components") == {0.99: {"unique": 1, "largest": 600}}
    assert utilization(points, [0.99])[0.99]["unique"] > 10


def test_threshold__is_decided_in_float64():
    # 1e-12 from the threshold, where float32's cosines scatter by 1e-7
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(20, 64, 64, generator=generator, dtype=torch.float64)).Q
    pairs = torch.zeros(2, 64, dtype=torch.float64)
    pairs[0, 0], pairs[1, 0], pairs[1, 1] = 1, 0.6, 0.8
    for seed in range(20):
        points = (pairs @ rotation[seed]).float()
        unit = F.normalize(points.double(), dim=-1)
        exact = float(unit[0] @ unit[1])
        assert len(duplicate_groups(points, exact - 1e-12).unique()) == 1
        assert len(duplicate_groups(points, exact + 1e-12).unique()) == 2


def test_threshold__is_strict():
    points = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0]])
    assert duplicate_groups(points, 0.8).tolist() == [0, 1, 2]
    assert duplicate_groups(points, 0.79).tolist() == [0, 1, 0]
    assert duplicate_groups(torch.eye(3), 0.0).tolist() == [0, 1, 2]


def test_reduced_precision__is_switched_off_and_restored():
    points = clusters(300, 20, 256, 0.45, seed=3)
    expected = duplicate_groups(points, 0.9)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(duplicate_groups(points, 0.9), expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_void_set__of_copies_opposite_to_the_mean_is_found_exactly():
    # the paper's ViT-B/16 at 1/16 of its size: 3430 copies of -mean among 48 other directions
    generator = torch.Generator().manual_seed(0)
    dim, copies = 64, 3430
    mean = F.normalize(torch.randn(dim, generator=generator), dim=0)
    others = torch.linalg.qr(torch.randn(dim, 48, generator=generator)).Q.T.repeat(14, 1)[:666]
    void = -mean + 1e-4 * torch.randn(copies, dim, generator=generator)
    order = torch.randperm(copies + len(others), generator=generator)
    directions = torch.cat([void, others])[order]
    for threshold, found in utilization(directions, [0.5, 0.9, 0.99]).items():
        assert found == {"unique": 49, "largest": copies}, threshold
    hits = (order >= copies).long()
    groups = duplicate_groups(directions, 0.9)
    report = void_set(directions, groups, 0.3 * mean, hits)
    assert (report.size, report.hits, report.images) == (copies, 0, 666)
    assert report.representative == int((order < copies).nonzero()[0])
    assert report.cosine_with_mean == pytest.approx(-1, abs=1e-6)
    assert report.is_void
    assert not void_set(directions, groups, mean, 1 + hits).is_void


def test_float64__is_kept():
    points = torch.tensor([[1.0, 0.0], [1.0, 1e-7]], dtype=torch.float64)
    assert duplicate_groups(points, 1 - 4e-15).tolist() == [0, 1]
    assert duplicate_groups(points, 1 - 6e-15).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("directions", "threshold", "words"),
    [
        (torch.ones(4), 0.9, "shape"),
        (torch.ones(0, 4), 0.9, "shape"),
        (torch.ones(2, 4), 1.0, "threshold=1.0"),
        (torch.ones(2, 4), float("nan"), "threshold=nan"),
        (torch.tensor([[1.0, float("nan")]]), 0.9, "NaN"),
    ],
)
def test_bad_input__is_named(directions, threshold, words):
    with pytest.raises(ValueError, match=words):
        duplicate_groups(directions, threshold)


def test_bad_shapes__of_the_void_set_are_named():
    with pytest.raises(ValueError, match="shape"):
        void_set(torch.eye(3), torch.zeros(3).long(), torch.ones(2), torch.zeros(3))
    with pytest.raises(ValueError, match="method='single'"):
        utilization(torch.eye(3), [0.5], method="single")


@pytest.mark.slow
def test_full_size__is_fast_and_small():
    """K 65536, p 256 without any duplicate: under 60 s on 2 cores and under 1 GB above the start."""
    import resource
    import time

    directions = torch.randn(65536, 256, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    groups = duplicate_groups(directions, 0.9)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert int(groups.max()) + 1 == 65536
    assert seconds < 60
    assert grown < 1000
