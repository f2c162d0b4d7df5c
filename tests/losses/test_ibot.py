"""iBOT's patch loss: against lightly, against the formulas image by image, and across processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinovmf_plugin.core.centering import CENTERINGS, make_centering
from dinovmf_plugin.core.prototypes import NORMALIZATIONS, Prototypes
from dinovmf_plugin.losses import ibot
from dinovmf_plugin.losses.ibot import ibot_patch_loss, patch_targets, update_patch_center

TAU_S, TAU_T, DIM, K, IMAGES, PATCHES = 0.1, 0.05, 16, 24, 4, 9
CELLS = list(itertools.product(NORMALIZATIONS, CENTERINGS))


def _units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def _prototypes(normalization: str, seed: int = 0) -> Prototypes:
    torch.manual_seed(seed)
    layer = Prototypes(DIM, K, normalization)  # type: ignore[arg-type]
    if normalization != "l2":
        torch.nn.init.uniform_(layer.weight_g, 0.5, 3)
    return layer


def _masks() -> Tensor:
    """Different numbers of masked patches; the third image has none."""
    masks = torch.zeros(IMAGES, PATCHES, dtype=torch.bool)
    masks[0, [0, 3, 4]] = masks[1, [8]] = masks[3, [1, 2, 5, 6, 7]] = True
    return masks


def _logits(y: Tensor, v: Tensor, g: Tensor, tau: float, vmf: bool) -> Tensor:
    """float64 logits from the definitions; log C_p by the paper's expansion, up to a constant."""
    w = g.double() * F.normalize(v.double(), dim=-1)
    logits = y.double() @ w.T / tau
    if vmf:
        nu, kappa = DIM / 2 - 1, g.double().abs().flatten() / tau
        s = (nu**2 + kappa**2).sqrt()
        logits = logits + nu * (nu + s).log() - s + 0.5 * s.log()
    return logits


def _slow_targets(l_t: Tensor, centering: str, vmf: bool, center: Tensor) -> Tensor:
    """Eqs. 8 and 9 with ``center`` as the plugin stores it; Sinkhorn by plain normalizations."""
    if centering == "sinkhorn":
        q = l_t.exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return q
    unit = TAU_T if centering == "logit" and not vmf else 1.0
    return (l_t - center.double() / unit).softmax(-1)


def _slow_loss(student: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """Mean over all images of each image's mean over its masked patches; both ``(M, K)``."""
    total, row = torch.zeros((), dtype=torch.float64), 0
    for mask in masks:
        count = int(mask.sum())
        if count:
            l, t = student[row : row + count], targets[row : row + count]
            total = total - (t * l.log_softmax(-1)).sum(-1).mean()
            row += count
    return total / len(masks)


# ---- value, center, parameters -------------------------------------------------------------------


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_patch_loss__two_steps__equals_formula(normalization, centering):
    vmf, masks = normalization == "vmf", _masks()
    student, teacher = _prototypes(normalization), _prototypes(normalization, seed=1)
    head = torch.nn.Linear(DIM, DIM)
    slow = {"w": head.weight, "b": head.bias, "v": student.weight_v, "g": student.weight_g}
    slow = {k: p.detach().double().requires_grad_(p.requires_grad) for k, p in slow.items()}
    module = make_centering(centering, K, momentum=0.6)
    center = torch.zeros(1, K, dtype=torch.float64)
    optimizers = [
        torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)
        for parameters in ([*head.parameters(), *student.parameters()], slow.values())
    ]
    for step in range(2):
        features = torch.randn(int(masks.sum()), DIM)
        patches = _units(IMAGES * PATCHES, DIM, seed=step)

        masked = patches[masks.flatten()]
        targets = patch_targets(module, teacher, masked, TAU_T)
        update_patch_center(module, teacher, patches, TAU_T)
        y = F.normalize(head(features), dim=-1)
        loss = ibot_patch_loss(y, student, targets, masks, TAU_S)

        l_all = _logits(patches, teacher.weight_v, teacher.weight_g, TAU_T, vmf).detach()
        slow_targets = _slow_targets(l_all[masks.flatten()], centering, vmf, center)
        y = F.normalize(features.double() @ slow["w"].T + slow["b"], dim=-1)
        slow_logits = _logits(y, slow["v"], slow["g"], TAU_S, vmf)
        expected = _slow_loss(slow_logits, slow_targets, masks)
        if centering == "logit":
            center = 0.6 * center + 0.4 * l_all.mean(0) * (1.0 if vmf else TAU_T)
        elif centering == "probability":
            center = 0.6 * center + 0.4 * l_all.softmax(-1).mean(0).log()

        torch.testing.assert_close(targets.double(), slow_targets, rtol=1e-3, atol=1e-6)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        if (
            vmf and centering != "sinkhorn"
        ):  # log C_p(0) is left out here, a constant in both spaces
            shift = (module.center.double() - center).mean()
            torch.testing.assert_close(module.center.double() - shift, center, rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(module.center.double(), center, rtol=1e-4, atol=1e-5)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    moved = [head.weight, head.bias, student.weight_v, student.weight_g]
    for parameter, reference in zip(moved, slow.values(), strict=True):
        torch.testing.assert_close(parameter.double(), reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalization", ["none", "l2"])
def test_patch_loss__logit_centering__equals_lightly(normalization):
    """Given a center, lightly (as DINOv2) forms the same loss; its center sees masked patches only."""
    lightly = pytest.importorskip("lightly.loss.ibot_loss")
    masks = torch.zeros(IMAGES, 3, 3, dtype=torch.bool)
    masks.view(IMAGES, PATCHES)[_masks()] = True
    student, teacher = _prototypes(normalization), _prototypes(normalization, seed=1)
    y = _units(int(masks.sum()), DIM).requires_grad_()
    patches = _units(IMAGES * PATCHES, DIM, seed=1)
    centering = make_centering("logit", K)
    centering.center.normal_(std=0.1)
    theirs = lightly.IBOTPatchLoss(output_dim=K, teacher_temp=TAU_T, student_temp=TAU_S)
    theirs.center.center.copy_(centering.center)

    masked = patches[masks.flatten()]
    gradients = []
    for ours in (True, False):
        if ours:
            targets = patch_targets(centering, teacher, masked, TAU_T)
            loss = ibot_patch_loss(y, student, targets, masks.flatten(1), TAU_S)
        else:
            loss = theirs(teacher.scores(masked).detach(), student.scores(y), masks)
        leaves = [p for p in (y, student.weight_v, student.weight_g) if p.requires_grad]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = centering.center.clone()
    update_patch_center(centering, teacher, patches, TAU_T)
    all_patches = 0.9 * before + 0.1 * teacher.scores(patches).mean(0)
    masked_only = 0.9 * before + 0.1 * teacher.scores(masked).mean(0)
    torch.testing.assert_close(centering.center, all_patches)
    torch.testing.assert_close(theirs.center.value, masked_only)


# ---- masks ---------------------------------------------------------------------------------------


def test_patch_loss__unmasked_image__adds_zero_and_counts():
    layer, masks = _prototypes("vmf"), _masks()
    y, targets = _units(9, DIM), torch.randn(9, K).softmax(-1)
    loss = ibot_patch_loss(y, layer, targets, masks, TAU_S)
    without = ibot_patch_loss(y, layer, targets, masks[[0, 1, 3]], TAU_S)
    torch.testing.assert_close(4 * loss, 3 * without)


def test_patch_loss__unmasked_batch__is_zero_with_a_graph():
    y = torch.zeros(0, DIM, requires_grad=True)
    masks = torch.zeros(IMAGES, PATCHES, dtype=torch.bool)
    loss = ibot_patch_loss(y, _prototypes("none"), torch.zeros(0, K), masks, TAU_S)
    loss.backward()
    assert loss.item() == 0
    assert y.grad is not None


def test_patch_loss__other_numbers_of_patches__is_an_error():
    with pytest.raises(ValueError, match="8 student and 9 teacher patches"):
        ibot_patch_loss(_units(8, DIM), _prototypes("none"), torch.zeros(9, K), _masks(), TAU_S)


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_targets_and_center__in_chunks__equal_all_scores_at_once(
    normalization, centering, monkeypatch
):
    monkeypatch.setitem(ibot._CHUNK_NUMBERS, "cpu", 5 * K)  # 36 patches: seven chunks of 5 and one
    layer, patches = _prototypes(normalization), _units(IMAGES * PATCHES, DIM)
    scores, log_normalizer = layer.scores(patches).detach(), layer.log_normalizer(TAU_T)
    once, chunked = (make_centering(centering, K) for _ in range(2))
    once.update(scores, TAU_T, log_normalizer)
    update_patch_center(chunked, layer, patches, TAU_T)
    torch.testing.assert_close(chunked.center, once.center)
    targets = patch_targets(chunked, layer, patches, TAU_T)
    torch.testing.assert_close(targets, once(scores, TAU_T, log_normalizer))
    if centering != "sinkhorn":
        assert once.center.abs().max() > 0


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_no_tensor__holds_the_logits_of_all_patches(normalization, centering, monkeypatch):
    monkeypatch.setitem(ibot._CHUNK_NUMBERS, "cpu", 4 * K)
    masks, layer = _masks(), _prototypes(normalization)
    patches = _units(IMAGES * PATCHES, DIM)
    with _LargestTensor() as largest:
        y = patches[masks.flatten()].clone().requires_grad_()
        module = make_centering(centering, K)
        targets = patch_targets(module, layer, y.detach(), TAU_T)
        update_patch_center(module, layer, patches, TAU_T)
        ibot_patch_loss(y, layer, targets, masks, TAU_S).backward()
    biggest = max(int(masks.sum()) * K, K * DIM, IMAGES * PATCHES * DIM)
    assert int(masks.sum()) * K <= largest.entries <= biggest < IMAGES * PATCHES * K


# ---- two processes -------------------------------------------------------------------------------


def _rank(rank: int, centering: str, unmasked: bool) -> dict[str, Tensor]:
    """One rank's half of the images: loss, averaged gradients, center."""
    return _half(slice(2 * rank, 2 * rank + 2), centering, unmasked, average=True)


def _half(images: slice, centering: str, unmasked: bool, average: bool) -> dict[str, Tensor]:
    masks = _masks()
    if unmasked:
        masks[:2] = False  # all that the first rank has
    teacher, student = _prototypes("vmf"), _prototypes("vmf", seed=1)
    y, patches = _units(IMAGES, PATCHES, DIM), _units(IMAGES, PATCHES, DIM, seed=1)
    y, patches, masks = y[images], patches[images], masks[images]
    module = make_centering(centering, K)
    module.center.copy_(torch.linspace(-1, 1, K))
    targets = patch_targets(module, teacher, patches[masks], TAU_T)
    update_patch_center(module, teacher, patches.flatten(0, 1), TAU_T)
    loss = ibot_patch_loss(y[masks], student, targets, masks, TAU_S)
    loss = loss + 0.0 * sum(p.sum() for p in student.parameters())
    loss.backward()
    out = {"loss": loss.detach(), "v": student.weight_v.grad, "g": student.weight_g.grad}
    if average:
        for value in out.values():
            torch.distributed.all_reduce(value)
            value /= 2
    return {**out, "center": module.center}


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("unmasked", [False, True])
def test_patch_loss__two_processes__equal_the_joined_batch(ddp, centering, unmasked):
    first, second = ddp(_rank, centering, unmasked)
    joined = _half(slice(None), centering, unmasked, average=False)
    for name, value in joined.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
