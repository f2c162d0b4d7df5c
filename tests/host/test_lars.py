"""LARS of the release adapter: its rule written out in numpy, and main's own optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dinovmf_plugin import host
from dinovmf_plugin.host.lars import LARS

LR, ETA, DECAY, MOMENTUM = 0.5, 0.02, 0.1, 0.9


def _steps(cls: Any, weights: list[Any], grads: list[list[Any]], **options: Any) -> list[Any]:
    """The weights (float64 arrays) after one step per entry of ``grads``."""
    tensors = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = cls(tensors, lr=LR, eta=ETA, weight_decay=DECAY, momentum=MOMENTUM, **options)
    for row in grads:
        for tensor, grad in zip(tensors, row, strict=True):
            tensor.grad = torch.tensor(grad)
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


@pytest.fixture
def problem() -> tuple[list[Any], list[list[Any]]]:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(3, 2)), rng.normal(size=2), np.zeros((2, 2))]
    # the second step's first gradient is so small that its own rate would exceed lr
    scales = ((1.0, 1.0, 1.0), (1e-6, 1.0, 1.0))
    return weights, [
        [s * rng.normal(size=w.shape) for s, w in zip(row, weights, strict=True)] for row in scales
    ]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_step__as_written_in_the_paper(problem, clip, exclude):
    weights, grads = problem
    found = _steps(LARS, weights, grads, clip_lr=clip, exclude_bias_n_norm=exclude)
    for i, start in enumerate(weights):
        w, buffer = start.copy(), np.zeros_like(start)
        for row in grads:
            g = row[i]
            if np.linalg.norm(w) > 0 and not (exclude and g.ndim == 1):
                ratio = ETA * np.linalg.norm(w)
                ratio /= np.linalg.norm(g) + DECAY * np.linalg.norm(w) + 1e-8
                g = (g + DECAY * w) * (min(ratio / LR, 1.0) if clip else ratio)
            buffer = MOMENTUM * buffer + g
            w = w - LR * buffer
        np.testing.assert_allclose(found[i], w, rtol=1e-12)


@pytest.mark.skipif(host.GENERATION != "main", reason="the release has no such optimizer")
@pytest.mark.parametrize("options", [{}, {"clip_lr": True, "exclude_bias_n_norm": True}])
def test_step__as_main(problem, options):
    theirs = host.BaseMomentumMethod._OPTIMIZERS["lars"]
    assert theirs is not LARS
    for ours, expected in zip(
        _steps(LARS, *problem, **options), _steps(theirs, *problem, **options), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_negative__named(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        LARS([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, name: -1})
