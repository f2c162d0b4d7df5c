"""On a GPU: the mathematics equal float64 on the CPU. ``pytest -m gpu`` on a machine with CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.masking import MaskSampler
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import exact_log_normalizer, log_normalizer
from dinovmf_plugin.losses import fused
from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy
from dinovmf_plugin.losses.dino import view_pairs

pytestmark = pytest.mark.gpu

VIEWS, ROWS, DIM, TAU = 6, 16, 64, 0.1
# relative errors of loss and gradients: rounding of the products' operands
TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double().cpu() - b).norm() / b.norm())


def problem(prototypes: int) -> tuple[Prototypes, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = Prototypes(DIM, prototypes, "vmf").double()
    layer.weight_g.data.uniform_(0.5, 3.0)
    y = F.normalize(torch.randn(VIEWS, ROWS, DIM, dtype=torch.float64), dim=-1)
    targets = (8 * torch.randn(2, ROWS, prototypes, dtype=torch.float64)).softmax(-1)
    return layer, y, targets


def loss_and_gradients(
    layer: Prototypes, y: torch.Tensor, targets: torch.Tensor
) -> list[torch.Tensor]:
    y = y.clone().requires_grad_()
    loss = prototype_cross_entropy(
        y,
        layer.weight_v,
        targets,
        temperature=TAU,
        magnitude=layer.weight_g.squeeze(-1),
        bias=layer.log_normalizer(TAU),
        pair_weights=view_pairs(2, VIEWS) / y.shape[1],
    )
    gradients = torch.autograd.grad(loss, [y, layer.weight_v, layer.weight_g])
    return [loss.detach(), *gradients]


def plain(layer: Prototypes, y: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """The definition in float64."""
    y = y.clone().requires_grad_()
    direction = F.normalize(layer.weight_v, dim=1)
    kappa = layer.weight_g.abs().squeeze(-1) / TAU
    nu = DIM / 2 - 1
    root = (nu**2 + kappa**2).sqrt()
    t = kappa**2 / (root + nu)
    bias = nu * torch.log1p(t / (2 * nu)) - t + 0.5 * torch.log1p(t / nu)
    logits = y @ (layer.weight_g * direction).t() / TAU + bias
    pairs = view_pairs(2, VIEWS).to(logits) / ROWS
    loss = -torch.einsum("vq,qnk,vnk->", pairs, targets, logits.log_softmax(-1))
    return [loss.detach(), *torch.autograd.grad(loss, [y, layer.weight_v, layer.weight_g])]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("prototypes", [96, 65536])
def test_loss__equals_float64(dtype: torch.dtype | None, prototypes: int) -> None:
    layer, y, targets = problem(prototypes)
    expected = plain(layer, y, targets)
    on_gpu = copy.deepcopy(layer).float().cuda()
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        found = loss_and_gradients(on_gpu, y.float().cuda(), targets.float().cuda())
    for name, a, b in zip(("loss", "y", "weight_v", "weight_g"), found, expected, strict=True):
        assert relative(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_fused_loss__equals_the_streamed_one(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 at sizes that no tile divides; the kernels really run."""
    torch.manual_seed(0)
    layer = Prototypes(dim, 5003, "vmf").cuda()
    layer.weight_g.data.uniform_(0.5, 3.0)
    y = F.normalize(torch.randn(VIEWS, 37, dim), dim=-1).cuda()
    targets = (8 * torch.randn(2, 37, 5003)).softmax(-1).cuda()
    found, calls, apply = {}, [], fused.FusedCrossEntropy.apply
    monkeypatch.setattr(
        fused.FusedCrossEntropy, "apply", lambda *args: calls.append(1) or apply(*args)
    )
    for switch in ("1", "0"):
        monkeypatch.setenv("DINOVMF_TRITON", switch)
        with torch.autocast("cuda", torch.bfloat16):
            found[switch] = loss_and_gradients(layer, y, targets)
    assert len(calls) == 1
    for a, b in zip(found["1"], found["0"], strict=True):
        assert relative(a, b.double().cpu()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_normalizer__float32_and_finite_under_autocast(dtype: torch.dtype) -> None:
    kappa = torch.linspace(0, 1e4, 2001, device="cuda")
    with torch.autocast("cuda", dtype):
        found = log_normalizer(kappa.to(dtype).float(), 256, order=2)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    exact = torch.from_numpy(exact_log_normalizer(kappa.to(dtype).double().cpu().numpy(), 256))
    assert relative(found, exact) < 1e-5


@pytest.mark.parametrize("centering", ["logit", "probability", "sinkhorn"])
def test_targets__equal_those_of_the_cpu(centering: str) -> None:
    torch.manual_seed(0)
    scores, bias = 3 * torch.randn(3, 32, 512).clamp(-1, 1), torch.randn(512)
    cpu, gpu = make_centering(centering, 512), make_centering(centering, 512).cuda()
    for batch in scores:
        a, b = cpu(batch, 0.04, bias), gpu(batch.cuda(), 0.04, bias.cuda())
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-7)
        cpu.update(batch, 0.04, bias)
        gpu.update(batch.cuda(), 0.04, bias.cuda())
    for name, value in cpu.state_dict().items():
        torch.testing.assert_close(gpu.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-5)


def test_masks__are_drawn_on_the_device_and_reproducible() -> None:
    sampler = MaskSampler([0.0, 0.3], [0.0, 0.2])
    first, again = (
        sampler(64, 14, 14, torch.Generator("cuda").manual_seed(seed)) for seed in (3, 3)
    )
    other = sampler(64, 14, 14, torch.Generator("cuda").manual_seed(4))
    assert first.is_cuda
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    share = first.float().flatten(1).mean(1)
    assert share.max() <= 0.5
    assert 0.05 < share.mean() < 0.25
