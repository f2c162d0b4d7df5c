"""prototype_cross_entropy: bad input gets one clear sentence."""

from __future__ import annotations

import pytest
import torch

from dinovmf_plugin.losses import prototype_cross_entropy

V, Q, N, P, K = 4, 2, 3, 5, 37
GOOD = {
    "embeddings": (V, N, P),
    "weight": (K, P),
    "targets": (Q, N, K),
    "scale": (K,),
    "bias": (K,),
    "pair_weights": (V, Q),
    "row_weights": (N,),
}
BAD = [
    ("embeddings", (V, N, P + 1), "weight has shape"),
    ("embeddings", (V, N + 1, P), "targets has shape"),
    ("embeddings", (P,), "embeddings"),
    ("embeddings", (0, N, P), "V=0"),
    ("weight", (K, P, 1), "weight"),
    ("weight", (K + 1, P), "targets has shape"),
    ("targets", (Q, N, K + 1), "targets has shape"),
    ("targets", (K,), "targets"),
    ("scale", (K, 1), "scale has shape"),
    ("bias", (1,), "bias has shape"),
    ("pair_weights", (Q, V), "pair_weights has shape"),
    ("row_weights", (N + 1,), "row_weights has shape"),
]


def call(temperature=0.3, **tensors):
    arguments = {k: torch.ones(s) for k, s in GOOD.items()} | tensors
    return prototype_cross_entropy(temperature=temperature, **arguments)


@pytest.mark.parametrize(("name", "shape", "message"), BAD)
def test_wrong_shape__names_the_tensor(name, shape, message):
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.ones(shape)})


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_temperature__must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        call(temperature=temperature)


@pytest.mark.parametrize("name", ["targets", "pair_weights", "row_weights"])
def test_gradient_that_would_be_lost__is_refused(name):
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        call(**{name: torch.ones(GOOD[name], requires_grad=True)})


def test_scale_and_magnitude__exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        call(magnitude=torch.ones(K))
