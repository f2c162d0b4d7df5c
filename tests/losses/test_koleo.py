"""The spread term against scipy's neighbors, gradcheck, and what it is for: copies part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch.nn import functional as F

from dinovmf_plugin.losses.koleo import koleo_loss
from dinovmf_plugin.mixture.utilization import duplicate_groups


def test_koleo__equals_scipy_neighbors():
    points = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)) * 3
    unit = F.normalize(points.double(), dim=-1).numpy()
    distance = cKDTree(unit).query(unit, k=2)[0][:, 1]
    assert float(koleo_loss(points)) == pytest.approx(-np.log(distance).mean(), abs=1e-5)


def test_gradient__is_that_of_the_formula():
    points = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(koleo_loss, (points.requires_grad_(),))


def test_identical_prototypes__give_finite_value_and_gradient():
    points = torch.ones(6, 4, requires_grad=True)
    loss = koleo_loss(points)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(points.grad).all()


def test_autocast__does_not_reach_it():
    points = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = koleo_loss(points)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, koleo_loss(points))


def test_subset__is_unbiased_and_repeatable():
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    full = float(koleo_loss(points))
    generator = torch.Generator().manual_seed(0)
    draws = [float(koleo_loss(points, num_anchors=40, generator=generator)) for _ in range(200)]
    assert np.mean(draws) == pytest.approx(full, abs=4 * np.std(draws) / 200**0.5)
    again = koleo_loss(points, num_anchors=40, generator=torch.Generator().manual_seed(0))
    assert float(again) == draws[0]


def test_descent__separates_a_forming_void_set():
    generator = torch.Generator().manual_seed(4)
    copies = torch.randn(1, 16, generator=generator) + 0.02 * torch.randn(
        40, 16, generator=generator
    )
    directions = torch.nn.Parameter(copies)
    optimizer = torch.optim.Adam([directions], lr=0.05)
    assert int(duplicate_groups(directions, 0.9).max()) == 0
    for _ in range(60):
        optimizer.zero_grad()
        koleo_loss(directions).backward()
        optimizer.step()
    assert int(duplicate_groups(directions, 0.9).max()) == 39


@pytest.mark.parametrize(
    ("points", "anchors", "words"),
    [(torch.ones(1, 4), None, "at least 2"), (torch.eye(4), 5, "num_anchors=5")],
)
def test_bad_input__is_named(points, anchors, words):
    with pytest.raises(ValueError, match=words):
        koleo_loss(points, num_anchors=anchors)
