"""The prototype layer: values against scipy and torch's weight_norm, gradients, half precision."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinovmf_plugin.core import vmf
from dinovmf_plugin.core.prototypes import NORMALIZATIONS, Prototypes

DIM, K, TAU = 16, 12, 0.1


def _layer(normalization: str, order: int = 0, spread: bool = True) -> Prototypes:
    torch.manual_seed(0)
    layer = Prototypes(DIM, K, normalization, order)
    if spread:
        with torch.no_grad():
            layer.weight_g.uniform_(0.3, 4.0)
            layer.weight_g[0] *= -1
    return layer


def _unit(n: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    y = torch.randn(n, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.normalize(y, dim=-1).to(dtype)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_init__names_shapes_and_values(normalization):
    torch.manual_seed(0)
    layer = Prototypes(64, 500, normalization)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"weight_v": (500, 64), "weight_g": (500, 1)}
    assert torch.equal(layer.weight_g, torch.ones(500, 1))
    # torch's default initialization of a linear layer: uniform in +- 1 / sqrt(p)
    bound = 1 / 8
    assert layer.weight_v.abs().max() <= bound
    assert layer.weight_v.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert layer.weight_g.requires_grad is (normalization != "l2")
    assert layer.weight_v.requires_grad


@pytest.mark.parametrize("order", [0, 2])
def test_forward__vmf__equals_scipy_formula(order):
    layer = _layer("vmf", order)
    y = _unit()
    g = layer.weight_g.detach().double().numpy()[:, 0]
    v = layer.weight_v.detach().double().numpy()
    w = g[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    expected = y.double().numpy() @ w.T / TAU
    expected += vmf.exact_log_normalizer(np.linalg.norm(w, axis=1) / TAU, DIM)
    # dim 16 has nu = 7: the first term alone is right to 1e-2, three terms to 1e-5
    bound = {0: 2e-2, 2: 2e-4}[order]
    assert np.abs(layer(y, TAU).detach().numpy() - expected).max() < bound


@pytest.mark.parametrize("normalization", ["none", "l2"])
def test_forward__none_and_l2__equal_weight_norm_and_load_its_weights(normalization):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = nn.utils.weight_norm(nn.Linear(DIM, K, bias=False))
    with torch.no_grad():
        linear.weight_g.uniform_(0.5, 2)
    layer = Prototypes(DIM, K, normalization)
    layer.load_state_dict(linear.state_dict())
    y = _unit()
    torch.testing.assert_close(layer(y, TAU), linear(y) / TAU)
    torch.testing.assert_close(layer.scores(y), linear(y))
    assert layer.log_normalizer(TAU) is None


def test_forward__vmf_at_initialization__none_up_to_a_constant():
    none, vmf_layer = _layer("none", spread=False), _layer("vmf", spread=False)
    y = _unit()
    difference = vmf_layer(y, TAU) - none(y, TAU)
    assert difference[0, 0].abs() > 1  # the normalizer is there ...
    assert (difference - difference[0, 0]).abs().max() < 1e-5  # ... and the same for all
    torch.testing.assert_close(
        vmf_layer(y, TAU).softmax(-1), none(y, TAU).softmax(-1), rtol=1e-5, atol=1e-7
    )


def test_forward__any_leading_shape_and_default_temperature():
    layer = _layer("vmf")
    y = _unit(6)
    torch.testing.assert_close(layer(y.reshape(2, 3, DIM), TAU).flatten(0, 1), layer(y, TAU))
    torch.testing.assert_close(layer(y), layer(y, 1.0))


def test_negative_magnitude__flips_the_direction():
    layer = _layer("vmf")
    assert layer.weight_g[0] < 0
    assert torch.equal(layer.magnitudes(), layer.weight_g.abs()[:, 0])
    torch.testing.assert_close(layer.concentration(TAU), layer.magnitudes() / TAU)
    torch.testing.assert_close(layer.directions().norm(dim=-1), torch.ones(K))
    torch.testing.assert_close(
        layer.magnitudes()[:, None] * layer.directions(), layer.weight(), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(layer.weight(), layer.scale()[:, None] * layer.weight_v)
    y = _unit()
    torch.testing.assert_close(layer.scores(y), y @ layer.weight().T)


def test_gradient__magnitude__gets_cosine_minus_mean_resultant_length():
    """d logit / d g = (cos(mu, y) - A_p(g / tau)) / tau: what keeps vMF prototypes from growing."""
    layer = _layer("vmf", order=2)
    y = _unit(1)
    logits = layer(y, TAU)[0]
    expected = (y @ layer.directions().T)[0] - vmf.mean_resultant_length(
        layer.concentration(TAU), DIM
    )
    expected = expected / TAU * torch.where(layer.weight_g[:, 0] < 0, -1, 1)
    expected = expected.detach()
    for k in range(K):
        (gradient,) = torch.autograd.grad(logits[k], layer.weight_g, retain_graph=True)
        assert gradient[k, 0].item() == pytest.approx(expected[k].item(), abs=2e-3)
        assert gradient.count_nonzero() <= 1


def test_gradient__log_normalizer__leaves_directions_alone():
    layer = _layer("vmf")
    layer.log_normalizer(TAU).sum().backward()
    assert layer.weight_v.grad is None
    assert bool((layer.weight_g.grad != 0).all())


def test_gradient__directions__are_tangential():
    layer = _layer("vmf")
    layer(_unit(), TAU).square().sum().backward()
    radial = (layer.weight_v.grad * layer.weight_v).sum(dim=-1)
    assert layer.weight_v.grad.norm(dim=-1).min() > 1
    assert radial.abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "input"])
def test_half_precision__logits_float32_with_an_exact_normalizer(dtype, how):
    layer = _layer("vmf")
    y = _unit()
    exact = layer.scores(y.to(dtype).float() if how == "input" else y).detach() / TAU
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        logits = layer(y.to(dtype) if how == "input" else y, TAU)
        bias = layer.log_normalizer(TAU)
    assert logits.dtype == bias.dtype == torch.float32
    full = vmf.log_normalizer(layer.weight_g.detach().double()[:, 0] / TAU, DIM)
    torch.testing.assert_close(bias.double(), full, rtol=1e-6, atol=1e-5)
    # D is added in float32: whatever error the half product has does not depend on D
    spacing = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    assert (logits.detach() - bias.detach() - exact).abs().max() < 3 * spacing * 4 / TAU


def test_half_precision__bf16_module__normalizer_stays_float32():
    layer = _layer("vmf").bfloat16()
    assert layer.log_normalizer(TAU).dtype == torch.float32
    assert layer(_unit(dtype=torch.bfloat16), TAU).dtype == torch.float32


def test_repr__shows_the_switch():
    assert "normalization='vmf'" in repr(_layer("vmf"))


@pytest.mark.parametrize("normalization", ["norm", "VMF", None, True])
def test_unknown_normalization__named(normalization):
    with pytest.raises(ValueError, match=r"normalization=.* is unknown: choose one of .*'vmf'"):
        Prototypes(DIM, K, normalization)


@pytest.mark.parametrize("dim", [1, 2])
def test_vmf_with_too_small_dim__named_at_construction(dim):
    with pytest.raises(ValueError, match=f"dim={dim} .*dim >= 3"):
        Prototypes(dim, K, "vmf")
    Prototypes(dim, K, "none")


@pytest.mark.parametrize(("dim", "num"), [(0, 4), (4, 0), (-1, 4)])
def test_impossible_sizes__named(dim, num):
    with pytest.raises(ValueError, match=f"dim={dim} and num_prototypes={num}"):
        Prototypes(dim, num)


def test_unknown_order__named_at_construction():
    with pytest.raises(ValueError, match="order=5"):
        Prototypes(DIM, K, "vmf", order=5)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [(5,), (2, 3), ()], ids=str)
def test_scores__without_gradient__equal_those_with(half, rows):
    torch.manual_seed(0)
    layer, y = Prototypes(8, 11), torch.randn(*rows, 8)
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        expected = layer.scores(y)
        with torch.no_grad():
            found = layer.scores(y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
