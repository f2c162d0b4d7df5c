"""The log-normalizer's Triton kernel: values in the interpreter, code for a GPU, and when it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinovmf_plugin.core import triton_use
from dinovmf_plugin.core.prototypes import Prototypes
from tests.interpreted import assert_passes_interpreted

_CHECKS = Path(__file__).with_name("interpreted_vmf.py")


def test_kernel__in_tritons_interpreter__equals_the_formula():
    assert_passes_interpreted(_CHECKS)


class OnGpu:
    is_cuda = True


def test_triton_serves__on_cuda_unless_switched_off(monkeypatch):
    monkeypatch.delenv("DINOVMF_TRITON", raising=False)
    monkeypatch.setattr(triton_use, "_installed", lambda: True)
    assert triton_use.triton_serves(OnGpu())
    assert not triton_use.triton_serves(torch.zeros(1))
    monkeypatch.setenv("DINOVMF_TRITON", "0")
    assert not triton_use.triton_serves(OnGpu())
    monkeypatch.delenv("DINOVMF_TRITON")
    monkeypatch.setattr(triton_use, "_installed", lambda: False)
    assert not triton_use.triton_serves(OnGpu())


@pytest.mark.gpu
def test_gpu__kernel_equals_the_formula(monkeypatch):
    layer = Prototypes(256, 5000, "vmf").cuda()
    layer.weight_g.data.uniform_(-3, 3)
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("DINOVMF_TRITON", switch)
        value = layer.log_normalizer(0.04)
        (gradient,) = torch.autograd.grad(value.square().sum(), layer.weight_g)
        found.append((value.detach(), gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
