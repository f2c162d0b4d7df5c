"""The spread of the prototypes against scipy's nearest neighbours and an autograd-free derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from dinovmf_plugin.losses.spread import nearest_neighbors, prototype_spread


def _weights(k: int = 23, dim: int = 5) -> torch.Tensor:
    scale = torch.rand(k, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    return torch.randn(k, dim, generator=torch.Generator().manual_seed(0)) * scale


def _nearest(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    distances, indices = cKDTree(unit).query(unit, k=2)
    return distances[:, 1], indices[:, 1]


@pytest.mark.parametrize("chunk", [1, 7, 23, 2048])
def test_nearest_neighbors__equal_scipy_for_every_chunk(chunk):
    weights = _weights()
    unit = torch.nn.functional.normalize(weights, dim=-1)
    _, expected = _nearest(weights.numpy())
    np.testing.assert_array_equal(nearest_neighbors(unit, chunk).numpy(), expected)


def test_prototype_spread__value_and_gradient():
    weights = _weights().double().requires_grad_()

    def value(x: np.ndarray) -> float:
        return float(-np.log(_nearest(x)[0] + 1e-8).mean())

    loss = prototype_spread(weights)
    loss.backward()
    x = weights.detach().numpy()
    assert float(loss.detach()) == pytest.approx(value(x), rel=1e-5)
    direction = np.random.default_rng(0).standard_normal(x.shape)
    numeric = (value(x + 1e-6 * direction) - value(x - 1e-6 * direction)) / 2e-6
    assert float((weights.grad.numpy() * direction).sum()) == pytest.approx(numeric, rel=1e-3)


def test_prototype_spread__ignores_lengths():
    weights = _weights()
    torch.testing.assert_close(prototype_spread(weights * 7), prototype_spread(weights))


def test_prototype_spread__minimising__separates_a_cluster():
    torch.manual_seed(0)
    weights = (torch.randn(1, 8) + 0.01 * torch.randn(12, 8)).requires_grad_()
    before = _nearest(weights.detach().numpy())[0].min()
    optimizer = torch.optim.SGD([weights], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        prototype_spread(weights).backward()
        optimizer.step()
    assert _nearest(weights.detach().numpy())[0].min() > 10 * before


def test_prototype_spread__exact_duplicates__finite():
    weights = _weights()
    weights[3] = weights[5]
    weights.requires_grad_()
    loss = prototype_spread(weights)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(weights.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prototype_spread__autocast__float32(dtype):
    weights = _weights()
    with torch.autocast("cpu", dtype=dtype):
        loss = prototype_spread(weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, prototype_spread(weights))
