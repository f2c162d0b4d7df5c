"""MSN's loss: against lightly, against the formulas in float64, and across processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core.centering import CENTERINGS, make_centering
from dinovmf_plugin.core.prototypes import NORMALIZATIONS, Prototypes
from dinovmf_plugin.losses.msn import mean_entropy_gap, msn_loss, msn_targets

TAU, SHARPEN, DIM, K, VIEWS, IMAGES = 0.1, 0.25, 16, 24, 3, 4
CELLS = list(itertools.product(NORMALIZATIONS, CENTERINGS))


def _units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def _prototypes(normalization: str) -> Prototypes:
    torch.manual_seed(0)
    layer = Prototypes(DIM, K, normalization)  # type: ignore[arg-type]
    if normalization != "l2":
        torch.nn.init.uniform_(layer.weight_g, 0.5, 3)
    return layer


def _slow_logits(y: Tensor, v: Tensor, g: Tensor, tau: float, vmf: bool) -> Tensor:
    w = g.double() * F.normalize(v.double(), dim=-1)
    logits = y.double() @ w.T / tau
    if vmf:  # log C_p by the paper's expansion, up to a constant
        nu, kappa = DIM / 2 - 1, g.double().abs().flatten() / tau
        s = (nu**2 + kappa**2).sqrt()
        logits = logits + nu * (nu + s).log() - s + 0.5 * s.log()
    return logits


def _slow_sharpened(l_target: Tensor, l_plain: Tensor, vmf: bool) -> Tensor:
    """MSN: softmax at 0.1 to the power 1 / 0.25, normalized; vMF: the mixture's posterior at 0.025."""
    if vmf:
        return l_target.softmax(-1)
    p = l_plain.softmax(-1) ** (1 / SHARPEN)
    return p / p.sum(-1, keepdim=True)


def _slow_sinkhorn(p: Tensor) -> Tensor:
    q = p.T / p.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / K
        q = q / q.sum(dim=0, keepdim=True) / len(p)
    return (q * len(p)).T


# ---- value and parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_msn_loss__two_steps__equals_formula(normalization, centering):
    vmf, layer = normalization == "vmf", _prototypes(normalization)
    module = make_centering(centering, K, momentum=0.6)
    head = torch.nn.Linear(DIM, DIM)
    slow = {"w": head.weight, "b": head.bias, "v": layer.weight_v, "g": layer.weight_g}
    slow = {k: p.detach().double().requires_grad_(p.requires_grad) for k, p in slow.items()}
    center = torch.zeros(1, K, dtype=torch.float64)
    optimizers = [
        torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)
        for parameters in ([*head.parameters(), *layer.parameters()], slow.values())
    ]
    for step in range(2):
        features, y_t = torch.randn(VIEWS, IMAGES, DIM), _units(IMAGES, DIM, seed=step)
        targets = msn_targets(module, layer, y_t, TAU * SHARPEN)
        cross_entropy, gap = msn_loss(F.normalize(head(features), dim=-1), layer, targets, TAU)

        v, g = slow["v"], slow["g"]
        sharpened = _slow_sharpened(
            _slow_logits(y_t, v, g, TAU * SHARPEN, vmf), _slow_logits(y_t, v, g, TAU, vmf), vmf
        ).detach()
        if centering == "sinkhorn":
            slow_targets = _slow_sinkhorn(sharpened)
        else:
            slow_targets = (sharpened.log() - center).softmax(-1)
            batch = sharpened.log().mean(0) if centering == "logit" else sharpened.mean(0).log()
            center = 0.6 * center + 0.4 * batch
        y = F.normalize(features.double() @ slow["w"].T + slow["b"], dim=-1)
        p = _slow_logits(y, v, g, TAU, vmf).softmax(-1)
        slow_ce = -(slow_targets * p.log()).sum(-1).mean()
        mean = p.mean(dim=(0, 1))
        slow_gap = math.log(K) + (mean * mean.log()).sum()

        torch.testing.assert_close(targets.double(), slow_targets, rtol=1e-3, atol=1e-6)
        assert cross_entropy.item() == pytest.approx(slow_ce.item(), rel=1e-5)
        assert gap.item() == pytest.approx(slow_gap.item(), rel=1e-4)
        for optimizer, loss in zip(
            optimizers, (cross_entropy + 0.7 * gap, slow_ce + 0.7 * slow_gap), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = [head.weight, head.bias, layer.weight_v, layer.weight_g]
    for parameter, reference in zip(moved, slow.values(), strict=True):
        torch.testing.assert_close(parameter.double(), reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_msn_loss__l2_and_sinkhorn__equals_lightly(weight):
    lightly = pytest.importorskip("lightly.loss.msn_loss")
    theirs = lightly.MSNLoss(temperature=TAU, regularization_weight=weight)
    layer, y_t = _prototypes("l2"), _units(IMAGES, DIM, seed=1)
    raw = torch.randn(VIEWS, IMAGES, DIM, requires_grad=True)  # lightly normalizes inside
    anchors = F.normalize(raw, dim=-1)
    targets = msn_targets(make_centering("sinkhorn", K), layer, y_t, TAU * SHARPEN)
    cross_entropy, gap = msn_loss(anchors, layer, targets, TAU)
    expected = theirs(raw.flatten(0, 1), y_t, layer.weight_v, SHARPEN)
    gradients = [
        torch.autograd.grad(loss, [raw, layer.weight_v])
        for loss in (cross_entropy + weight * gap, expected)
    ]
    assert (cross_entropy + weight * gap).item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


# ---- properties ----------------------------------------------------------------------------------


def test_msn_targets__equal_magnitudes__vmf_equals_l2():
    y_t = _units(IMAGES, DIM)
    free, unit = _prototypes("vmf"), _prototypes("l2")
    torch.nn.init.ones_(free.weight_g)
    for centering in CENTERINGS:
        targets = [
            msn_targets(make_centering(centering, K), layer, y_t, 0.025) for layer in (free, unit)
        ]
        torch.testing.assert_close(*targets)


def test_mean_entropy_gap__underflowing_probabilities__finite_gradient():
    logits = torch.tensor([[300.0, 0.0, -300.0], [300.0, -10.0, 0.0]], requires_grad=True)
    gap = mean_entropy_gap(logits)
    gap.backward()
    assert gap.item() == pytest.approx(math.log(3))
    assert torch.isfinite(logits.grad).all()


def test_mean_entropy_gap__bounds():
    assert mean_entropy_gap(torch.eye(5) * 1e3).item() == pytest.approx(0, abs=1e-6)
    assert mean_entropy_gap(torch.tensor([[1e3, 0.0]]).repeat(3, 1)).item() == pytest.approx(
        math.log(2)
    )


# ---- two processes -------------------------------------------------------------------------------


def _half(images: slice, normalization: str, average: bool) -> dict[str, Tensor]:
    layer = _prototypes(normalization)
    y_t, y = _units(IMAGES, DIM, seed=1)[images], _units(VIEWS, IMAGES, DIM)[:, images]
    targets = msn_targets(make_centering("sinkhorn", K), layer, y_t, TAU * SHARPEN)
    cross_entropy, gap = msn_loss(y, layer, targets, TAU)
    loss = cross_entropy + gap
    loss.backward()
    out = {"loss": loss.detach(), "gap": gap.detach()}
    out |= {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    if average:
        for value in out.values():
            torch.distributed.all_reduce(value)
            value /= 2
    return out


def _rank(rank: int, normalization: str) -> dict[str, Tensor]:
    return _half(slice(2 * rank, 2 * rank + 2), normalization, average=True)


@pytest.mark.parametrize("normalization", ["l2", "vmf"])
def test_msn_loss__two_processes__equal_the_joined_batch(ddp, normalization):
    """Averaging gradients over ranks, as DDP does, is right for the prototypes and through the mean."""
    results = ddp(_rank, normalization)
    joined = _half(slice(None), normalization, average=False)
    assert ("weight_g" in joined) == (normalization == "vmf")
    for name, value in joined.items():
        for result in results:
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6)
