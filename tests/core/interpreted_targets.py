"""The fused targets, in Triton's interpreter on the CPU: targets and center of the plain formulas.

Run by ``test_targets`` in a process of its own: whether kernels are interpreted is decided when triton is
imported.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.core import target_kernels, targets
from dinovmf_plugin.core.centering import LogitCentering, ProbabilityCentering, make_centering
from dinovmf_plugin.core.prototypes import Prototypes

CENTERINGS = {
    "logit": lambda count: LogitCentering(count, momentum=0.7),
    "logit, raw scores": lambda count: LogitCentering(count, momentum=0.7, raw_scores=True),
    "probability": lambda count: ProbabilityCentering(count, momentum=0.7),
}
SIZES = {"partial tiles": (21, 300), "several shares": (5, 3000), "one row": (1, 128)}


@pytest.fixture
def fused(monkeypatch):
    """Kernels on the CPU; calls are counted."""
    calls = []
    make = target_kernels.fused_targets

    def counting(*args):
        calls.append(args)
        return make(*args)

    monkeypatch.setattr(target_kernels, "fused_targets", counting)
    monkeypatch.setattr(targets, "triton_serves", lambda tensor: True)
    return calls


def make_case(name, normalization, rows, count):
    torch.manual_seed(0)
    layer = Prototypes(16, count, normalization)
    layer.weight_g.data.uniform_(-2, 2)
    centering = CENTERINGS[name](count)
    centering.center.normal_()
    return layer, centering, F.normalize(torch.randn(rows, 16), dim=-1)


def plain(centering, layer, y, temperature, update):
    scores, bias = layer.scores(y), layer.log_normalizer(temperature)
    found = centering(scores, temperature, bias)
    if update:
        centering.update(scores, temperature, bias)
    return found


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("normalization", ["none", "vmf"])
@pytest.mark.parametrize("name", CENTERINGS)
def test_targets_and_center__equal_the_plain_formulas(fused, name, normalization, sizes, update):
    layer, centering, y = make_case(name, normalization, *sizes)
    exact, before = copy.deepcopy(centering), centering.center.clone()
    expected = plain(exact, layer.double(), y.double(), 0.05, update).clone()
    bias = layer.float().log_normalizer(0.05)
    found = targets.teacher_targets(centering, layer, y, 0.05, bias, update=update)
    assert len(fused) == 1
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(centering.center, exact.center, rtol=1e-5, atol=1e-5)
    assert torch.equal(centering.center, before) is not update


def test_logits_hundreds_of_nats_apart__stay_finite(fused):
    layer, centering, y = make_case("probability", "none", 8, 300)
    layer.weight_g.data.mul_(100)
    exact = copy.deepcopy(centering)
    expected = plain(exact, layer, y, 0.05, update=True).clone()
    found = targets.teacher_targets(centering, layer, y, 0.05, None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert exact.center.min() < -200
    torch.testing.assert_close(centering.center, exact.center, rtol=1e-5, atol=1e-3)


def test_sinkhorn_and_no_rows__take_the_plain_formulas(fused):
    layer, centering, y = make_case("logit", "none", 6, 128)
    found = targets.teacher_targets(make_centering("sinkhorn", 128), layer, y, 0.05, None)
    torch.testing.assert_close(found.sum(-1), torch.ones(6))
    assert targets.teacher_targets(centering, layer, y[:0], 0.05, None, update=False).shape == (
        0,
        128,
    )
    assert not fused
