"""The kernel of the log-normalizer in Triton's interpreter; run by ``test_vmf_kernel``."""

from __future__ import annotations

import pytest
import torch

from dinovmf_plugin.core.vmf import log_normalizer
from dinovmf_plugin.core.vmf_kernel import FusedLogNormalizer


@pytest.mark.parametrize("dim", [16, 256, 1024])
@pytest.mark.parametrize("temperature", [0.04, 0.1, 1.0])
def test_value_and_gradient__equal_the_formula_in_float64(dim, temperature):
    spread = torch.logspace(-6, 2.5, 1500)
    magnitude = torch.cat([torch.zeros(1), spread, -spread]).requires_grad_()
    exact = magnitude.detach().double().requires_grad_()
    value = FusedLogNormalizer.apply(magnitude, temperature, dim)
    expected = log_normalizer(exact.abs() / temperature, dim)
    assert value.dtype == torch.float32
    # the same roundings as in float32's own formula
    eager = (log_normalizer(magnitude.detach().abs() / temperature, dim) - expected).abs().max()
    assert float((value - expected).abs().max()) < 2 * float(eager) + 1e-6
    weights = torch.linspace(-1, 1, len(magnitude))
    (gradient,) = torch.autograd.grad((value * weights).sum(), magnitude)
    (slope,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)


def test_huge_concentrations__do_not_overflow():
    magnitude = torch.tensor([1e20, -1e25], requires_grad=True)
    value = FusedLogNormalizer.apply(magnitude, 0.1, 256)
    (gradient,) = torch.autograd.grad(value.sum(), magnitude)
    assert value.isfinite().all()
    torch.testing.assert_close(gradient, torch.tensor([-10.0, 10.0]))
