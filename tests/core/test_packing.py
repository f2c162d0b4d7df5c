"""Packed forward: tokens and gradients of one forward per size, in any of timm's plain variants."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dinovmf_plugin.core import packing
from dinovmf_plugin.core.packing import Crops, can_pack, forward_packed
from dinovmf_plugin.core.vit import forward_tokens

VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
}


def make_vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0, **options
    )


def crops() -> list[Crops]:
    generator = torch.Generator().manual_seed(1)

    def images(count, size):
        return torch.randn(count, 3, size, size, generator=generator)

    masks = torch.rand(3, 16, generator=generator) < 0.4
    token = torch.randn(1, 1, 24, generator=generator).requires_grad_()
    return [
        Crops(images(3, 32), masks=masks, mask_token=token),
        Crops(images(5, 16)),
        Crops(images(2, 40), keep=torch.tensor([0, 3, 7, 24])),
    ]


def readout(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((i + 1) * out.square().mean() + out[:, 0].sum() for i, out in enumerate(outputs))


def gradients(vit: nn.Module, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    vit.zero_grad()
    readout(outputs).backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_gradients__equal_one_forward_per_size(variant, fused):
    vit = make_vit(**VARIANTS[variant]).double()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    inputs = [Crops(c.images.double(), c.masks, c.mask_token, c.keep) for c in crops()]
    assert can_pack(vit)
    packed = forward_packed(vit, inputs)
    single = [forward_tokens(vit, c.images, **c.options()) for c in inputs]
    assert [x.shape for x in packed] == [x.shape for x in single]
    for a, b in zip(packed, single, strict=True):
        torch.testing.assert_close(a, b)
    expected = gradients(vit, single)
    for name, grad in gradients(vit, packed).items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert inputs[0].mask_token.grad.abs().sum() > 0


def test_one_size__equals_the_ordinary_forward():
    vit = make_vit()
    (one,) = forward_packed(vit, crops()[:1])
    torch.testing.assert_close(one, forward_tokens(vit, **vars(crops()[0])))


def test_other_blocks__take_the_ordinary_path(monkeypatch):
    vit = make_vit()
    vit.blocks[1] = nn.Sequential(vit.blocks[1])
    monkeypatch.setattr(packing, "packed_block", None)  # would fail
    assert not can_pack(vit)
    both = forward_packed(vit, crops()[:2])
    torch.testing.assert_close(both[1], forward_tokens(vit, crops()[1].images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend__both_ways_are_the_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=generator).to(dtype).requires_grad_()
    weights = (q.double() @ k.double().mT * 0.4).softmax(-1)
    expected = torch.autograd.grad((weights @ v.double()).square().sum(), (q, k, v))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = packing.attend(q, k, v, 0.4, fused=fused)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), weights @ v.double(), **tolerance)
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), **tolerance)


def test_attend__half_precision_with_gradients_on_a_cpu__is_not_the_fused_kernel(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("fused")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    packing.attend(x.requires_grad_(), x, x, 0.5)
    with pytest.raises(AssertionError, match="fused"):
        packing.attend(x.detach(), x.detach(), x.detach(), 0.5)


def test_grad_checkpointing__same_values_and_gradients():
    vit = make_vit(drop_path_rate=0.4)
    again = copy.deepcopy(vit)
    again.set_grad_checkpointing(True)
    found = []
    for network in (vit, again):
        torch.manual_seed(5)  # the same images are dropped
        outputs = forward_packed(network, crops())
        found.append((outputs, gradients(network, outputs)))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, msg=name)


# ---- stochastic depth ----------------------------------------------------------------------------


def test_stochastic_depth__drops_whole_images_at_each_blocks_rate_and_keeps_the_mean():
    vit, shapes = make_vit(drop_path_rate=0.5), ((400, 2), (600, 3))
    torch.manual_seed(0)
    x = torch.zeros(2 * 400 + 3 * 600, 24)
    factors = list(packing._stochastic_depth(vit.train(), shapes, x))
    assert factors[:2] == [None, None]  # the first block's rate is 0
    for kept, rate in zip(factors[2:], (0.25, 0.25, 0.5, 0.5), strict=True):
        large, small = kept[:800].view(400, 2), kept[800:].view(600, 3)
        for part in (large, small):
            assert torch.equal(part, part[:, :1].expand_as(part))
        values = torch.cat([large[:, 0], small[:, 0]])
        torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
        assert abs(float((values == 0).float().mean()) - rate) < 0.05
    assert not torch.equal(factors[4], factors[5])


def test_stochastic_depth__dropped_branches_leave_the_image_as_it_was():
    vit = make_vit(drop_path_rate=0.5).train()
    block, x = vit.blocks[2], torch.randn(2 * 3 + 5, 24)
    kept = torch.zeros(11, 1)
    assert torch.equal(packing.packed_block(block, x, ((2, 3), (1, 5)), kept, kept), x)
    kept[6:] = 2.0
    out = packing.packed_block(block, x, ((2, 3), (1, 5)), kept, None)
    attended = x[6:] + 2 * block.attn(block.norm1(x[6:])[None])[0]
    torch.testing.assert_close(out[6:], attended + block.mlp(block.norm2(attended)))


def test_stochastic_depth__off_in_eval_mode():
    vit = make_vit(drop_path_rate=0.5).eval()
    first, second = (forward_packed(vit, crops()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
