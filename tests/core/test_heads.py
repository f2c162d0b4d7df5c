"""The projection head: the official architecture, its initialization and names."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from dinovmf_plugin.core.heads import DINOHead


def _head(**kwargs) -> DINOHead:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 20, "bottleneck_dim": 8, "num_prototypes": 30}
    return DINOHead(12, **{**sizes, **kwargs})


@pytest.mark.parametrize("use_bn", [False, True])
def test_forward__equals_lightly(use_bn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = DINOProjectionHead(12, 20, 8, 30, batch_norm=use_bn, norm_last_layer=False)
    for norm in (m for m in reference.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
    head = _head(use_bn=use_bn)
    theirs = reference.state_dict()
    layers = [value for name, value in theirs.items() if name.startswith("layers.")]
    # the same tensors in the same order, but lightly has no bias in front of BatchNorm
    absent = {f"mlp.{i}.bias": torch.zeros(20) for i in (0, 3)} if use_bn else {}
    names = [name for name in head.mlp.state_dict(prefix="mlp.") if name not in absent]
    last = {name: theirs[name] for name in ("last_layer.weight_v", "last_layer.weight_g")}
    head.load_state_dict({**dict(zip(names, layers, strict=True)), **absent, **last})
    x = torch.randn(16, 12)
    torch.testing.assert_close(head.last_layer(head(x), 1.0), reference(x))


def test_names__are_the_official_ones():
    assert list(_head().state_dict()) == [
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
        "mlp.4.weight",
        "mlp.4.bias",
        "last_layer.weight_v",
        "last_layer.weight_g",
    ]
    # official order with BatchNorm: linear, norm, activation
    kinds = [type(m).__name__ for m in _head(use_bn=True).mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


def test_init__truncated_normal_for_the_mlp_default_for_directions():
    torch.manual_seed(0)
    head = DINOHead(384, hidden_dim=512, bottleneck_dim=256, num_prototypes=1000)
    linears = [m for m in head.mlp if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))
    # the init pass must not reach the prototypes: uniform in +- 1/16, norms about 0.577
    norms = head.last_layer.weight_v.norm(dim=-1)
    assert norms.mean().item() == pytest.approx(3**-0.5, rel=0.02)
    assert head.last_layer.weight_v.abs().max() <= 1 / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward__unit_vectors_in_every_precision(dtype):
    head = _head().to(dtype)
    x = torch.randn(6, 12).to(dtype)
    y = head(x)
    assert y.shape == (6, 8)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (y.float().norm(dim=-1) - 1).abs().max() < tolerance
    # an all-zero bottleneck (zero input, zero biases) has no direction, but must not be NaN
    zero = head(torch.zeros(2, 12, dtype=dtype))
    assert bool(zero.isfinite().all())
    if (
        dtype != torch.float16
    ):  # its gradient, 1 / eps, is beyond float16: a GradScaler skips the step
        zero.float().sum().backward()
        assert bool(head.mlp[0].weight.grad.isfinite().all())


def test_forward__leading_dimensions():
    head = _head()
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(head(x).flatten(0, 1), head(x.flatten(0, 1)))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_num_layers(layers):
    head = _head(num_layers=layers)
    assert sum(isinstance(m, nn.Linear) for m in head.mlp) == layers
    assert isinstance(head.mlp[-1], nn.Linear)
    assert head(torch.randn(2, 12)).shape == (2, 8)


def test_num_layers_0__named():
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        _head(num_layers=0)


def test_settings_reach_the_prototypes():
    prototypes = _head(normalization="vmf", order=2).last_layer
    assert (prototypes.dim, prototypes.num_prototypes) == (8, 30)
    assert (prototypes.normalization, prototypes.order) == ("vmf", 2)
