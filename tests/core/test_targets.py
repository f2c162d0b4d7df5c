"""Targets and the center's step in one call: the fused kernels, and the plain path beside its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.targets import teacher_targets
from tests.interpreted import assert_passes_interpreted

_CHECKS = Path(__file__).with_name("interpreted_targets.py")
NAMES = ("logit", "probability", "sinkhorn")


def test_kernels__in_tritons_interpreter__equal_the_plain_formulas():
    assert_passes_interpreted(_CHECKS)


@pytest.mark.parametrize("normalization", ["none", "vmf"])
@pytest.mark.parametrize("name", NAMES)
def test_cpu__targets_of_the_center_as_it_was__then_the_center_moves(name, normalization):
    torch.manual_seed(0)
    layer = Prototypes(16, 40, normalization)
    layer.weight_g.data.uniform_(0.5, 2)
    y = F.normalize(torch.randn(12, 16), dim=-1)
    joined, apart = make_centering(name, 40), make_centering(name, 40)
    for _ in range(3):
        scores, bias = layer.scores(y), layer.log_normalizer(0.1)
        expected = apart(scores, 0.1, bias).clone()
        kept = apart.center.clone()
        apart.update(scores, 0.1, bias)
        assert torch.equal(teacher_targets(joined, layer, y, 0.1, bias, update=False), expected)
        assert torch.equal(joined.center, kept)
        assert torch.equal(teacher_targets(joined, layer, y, 0.1, bias), expected)
        assert torch.equal(joined.center, apart.center)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("normalization", ["none", "vmf"])
@pytest.mark.parametrize("name", NAMES)
def test_gpu__kernels_equal_the_plain_formulas(monkeypatch, name, normalization, half):
    torch.manual_seed(0)
    layer = Prototypes(256, 5000, normalization).cuda()
    layer.weight_g.data.uniform_(-3, 3)
    y = F.normalize(torch.randn(100, 256, device="cuda"), dim=-1)
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("DINOVMF_TRITON", switch)
        centering = make_centering(name, 5000).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            bias = layer.log_normalizer(0.04)
            made = [teacher_targets(centering, layer, y, 0.04, bias) for _ in range(2)]
        found.append((*made, centering.center))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
