"""What one training step asks of the device: nothing is waited for, and kernels are few."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback

from dinovmf_plugin.benchmarks.launches import Launches, StepLaunches
from dinovmf_plugin.methods.base import NonFiniteLossError
from dinovmf_plugin.methods.ibot import IBOT
from tests.methods.dinov2 import DINOV2

METHODS = ("dino_multicrop", "dino_vmf", "msn", "msn_vmf")


def count(tiny_cfg, crop_loader, build, fit, method, precision="32-true", **more):
    cfg = tiny_cfg(
        method,
        **{
            "max_epochs": 1,
            "data.num_small_crops": 2,
            "knn_eval.enabled": True,
            "method_kwargs.clip_grad": 0.3,
            "optimizer.name": "adamw",
            **more,
        },
    )
    if method.startswith("msn"):
        cfg.method_kwargs.pop("freeze_last_layer", None)
    counted = StepLaunches(step=1)
    fit(build(cfg, depth=None), crop_loader(3), callbacks=[counted], precision=precision)
    assert list(counted.phases) == ["forward", "backward", "update", "after"]
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_step__waits_for_nothing(tiny_cfg, crop_loader, build, fit, method):
    counted = count(tiny_cfg, crop_loader, build, fit, method)
    assert counted.waits == 0, counted.operations


@pytest.mark.parametrize(("method", "more"), [("ibot", {}), ("ibot_vmf", {}), ("ibot_vmf", DINOV2)])
def test_step_of_ibot__only_the_masks_are_read_and_they_are_the_processors(
    tiny_cfg, crop_loader, build, fit, monkeypatch, method, more
):
    masks = torch.rand(8, 4) < 0.4
    monkeypatch.setattr(IBOT, "draw_masks", lambda self, images: masks)
    counted = count(tiny_cfg, crop_loader, build, fit, method, **more)
    assert counted.waits == counted.operations["aten::nonzero"] == 1, counted.operations


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*METHODS, "ibot", "ibot_vmf"])
def test_gpu__step__waits_for_nothing(tiny_cfg, crop_loader, build, fit, method):
    class Strict(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

        def on_train_batch_end(self, *_) -> None:
            torch.cuda.set_sync_debug_mode("default")

    cfg = tiny_cfg(method, **{"max_epochs": 1, "method_kwargs.clip_grad": 0.3})
    if method.startswith("msn"):
        cfg.method_kwargs.pop("freeze_last_layer", None)
    try:
        fit(build(cfg), crop_loader(3), callbacks=[Strict()], accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_update__is_a_handful_whatever_the_depth(tiny_cfg, crop_loader, build, fit):
    """Clipping, optimizer and EMA: lists of tensors, not one kernel per tensor."""
    counted = count(tiny_cfg, crop_loader, build, fit, "dino_vmf")
    assert counted.phases["update"].total < 20, counted.phases["update"].operations
    assert counted.phases["after"].operations["aten::_foreach_lerp_"] == 2  # backbone and head
    assert counted.phases["after"].total < 12, counted.phases["after"].operations


@pytest.mark.parametrize("method", ["dino_multicrop", "dino_vmf"])
def test_bf16__every_weight_is_cast_once_a_step(
    tiny_cfg, crop_loader, build, fit, monkeypatch, method
):
    """Lightning keeps no casts (``cache_enabled=False``): all crops go through a layer at once.

    Only the patch embedding, a convolution, sees global and local crops one after the other.
    """
    module = build(tiny_cfg(method, **{"max_epochs": 1, "data.num_small_crops": 2}), depth=None)
    names = {p.data_ptr(): name for name, p in module.named_parameters()}
    casts: Counter[str] = Counter()
    dispatch = Launches.__torch_dispatch__

    def spy(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::_to_copy" and kwargs.get("dtype") == torch.bfloat16:
            casts[names.get(args[0].data_ptr(), "")] += 1
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(Launches, "__torch_dispatch__", spy)
    fit(module, crop_loader(3), callbacks=[StepLaunches(step=1)], precision="bf16-mixed")
    del casts[""]
    for part in ("backbone.blocks", "momentum_backbone.blocks", "head.mlp", "momentum_head.mlp"):
        assert any(name.startswith(part) for name in casts), part
    twice = {name for name, count in casts.items() if count > 1}
    assert twice == {f"backbone.patch_embed.proj.{name}" for name in ("weight", "bias")}
    assert max(casts.values()) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite__stops_before_the_weights_move(
    tiny_cfg, crop_loader, build, fit, value
):
    module = build(tiny_cfg(max_epochs=1))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    loss = module.distillation_loss

    def broken(crops):
        out = loss(crops)
        object.__setattr__(out, "loss", out.loss * value)
        return out

    module.distillation_loss = broken
    with pytest.raises(NonFiniteLossError, match=r"the loss became (nan|inf) at step 0"):
        fit(module, crop_loader(2))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), name
