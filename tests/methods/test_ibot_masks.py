"""Which patches iBOT masks and where the mask token stands."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dinovmf_plugin.core import vit as backbones


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
def test_mask_token__stands_before_the_positions_in_the_hosts_own_vits(
    tiny_cfg, make_crops, build, monkeypatch, name
):
    module = build(tiny_cfg("ibot", **{"backbone.name": name, "backbone.kwargs.patch_size": 8}))
    for parameter in (module.mask_token, module.backbone.pos_embed):
        torch.nn.init.normal_(parameter)
    masks, seen = torch.rand(8, 16) < 0.4, []
    module.draw_masks = lambda images: masks
    embed = backbones.embed

    def spy(vit, *arguments):
        tokens = embed(vit, *arguments)
        if vit is module.backbone:
            seen.append(tokens)
        return tokens

    monkeypatch.setattr(backbones, "embed", spy)
    _, crops, _ = make_crops()
    module.distillation_loss(crops)
    patches = module.backbone.patch_embed.proj(torch.cat(crops[:2])).flatten(2).transpose(1, 2)
    expected = torch.where(masks[..., None], module.mask_token, patches)
    expected = expected + module.backbone.pos_embed[:, 1:]
    torch.testing.assert_close(seen[0][:, 1:], expected)
    assert [len(x) for x in seen] == [8, 8]  # masked globals, whole local crops


def test_patch_tokens__are_neither_cls_nor_registers(tiny_cfg, make_crops, build):
    module = build(tiny_cfg("ibot", **{"backbone.kwargs.reg_tokens": 3}))
    images = make_crops()[1][0]
    tokens = backbones.forward_tokens(module.backbone, images)
    assert tokens.shape[1] == 1 + 3 + 4
    assert torch.equal(module.patch_tokens(tokens, images), tokens[:, 4:])
    assert torch.isfinite(module.distillation_loss(make_crops()[1]).loss)


def test_masks__are_a_function_of_seed_epoch_batch_and_rank(tiny_cfg, build, monkeypatch):
    images, module = torch.zeros(8, 3, 224, 224), build(tiny_cfg("ibot"))

    def drawn(seed: int = 0, epoch: int = 0, batch: int = 0, rank: int = 0) -> Tensor:
        module.cfg.seed, module._batch_index = seed, batch
        monkeypatch.setattr(type(module), "current_epoch", epoch)
        monkeypatch.setattr(type(module), "global_rank", rank)
        torch.rand(3)  # the global generator has no say
        return module.draw_masks(images)

    first = drawn()
    assert torch.equal(first, drawn())
    others = [drawn(seed=1), drawn(epoch=1), drawn(batch=1), drawn(rank=1)]
    for a, b in itertools.combinations([first, *others], 2):
        assert not torch.equal(a, b)


def test_unmasked_batch__trains_and_touches_the_mask_token(tiny_cfg, make_crops, build):
    cfg = tiny_cfg("ibot_vmf")
    cfg.method_kwargs.update(pred_ratio=[0.0], pred_ratio_var=[0.0])
    module = build(cfg)
    out = module.distillation_loss(make_crops()[1])
    out.loss.backward()
    assert float(out.scalars["mask_ratio"]) == 0
    assert float(out.scalars["train_patch_loss"]) == 0
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == ["classifier.weight", "classifier.bias"]  # used by the online probe
    assert not module.mask_token.grad.any()
