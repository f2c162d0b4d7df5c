"""performance.compile and performance.grad_checkpointing change speed and memory, and no value."""

from __future__ import annotations

import shutil

import pytest
import torch

from dinovmf_plugin.methods import acceleration

METHODS = ("dino_vmf", "ibot_vmf", "msn")


def train(tiny_cfg, crop_loader, build, fit, method, switches, depth=3, **trainer):
    # not AdamW, which makes steps of the noise in gradients that are 0, such as those of the keys' bias
    cfg = tiny_cfg(method, **{"max_epochs": 1, "data.num_small_crops": 2, "optimizer.name": "sgd"})
    cfg.optimizer.kwargs = {}
    cfg.performance = {"disable_channel_last": False, **switches}
    if method == "msn":
        del cfg.method_kwargs["freeze_last_layer"]
    module = build(cfg, depth=depth)
    losses, loss = [], module.distillation_loss
    module.distillation_loss = lambda crops: losses.append(out := loss(crops)) or out
    fit(module, crop_loader(3), **trainer)
    return module, torch.stack([out.loss.detach() for out in losses])


def assert_equal(found, expected):
    (module, losses), (reference, reference_losses) = found, expected
    torch.testing.assert_close(losses, reference_losses, rtol=1e-5, atol=1e-6)
    state, reference_state = module.state_dict(), reference.state_dict()
    assert list(state) == list(reference_state)
    for name, value in state.items():
        torch.testing.assert_close(value, reference_state[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_grad_checkpointing__equal_values(tiny_cfg, crop_loader, build, fit, monkeypatch, method):
    from torch.utils import checkpoint

    plain = train(tiny_cfg, crop_loader, build, fit, method, {})
    calls, original = [], checkpoint.checkpoint
    monkeypatch.setattr(
        checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    assert_equal(
        train(tiny_cfg, crop_loader, build, fit, method, {"grad_checkpointing": True}), plain
    )
    assert len(calls) == 3 * 3  # every block of the student in every step, none of the teacher


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("switches", [{}, {"grad_checkpointing": True}])
def test_compile__equal_values_one_code_for_all_blocks(tiny_cfg, crop_loader, build, fit, switches):
    from torch._dynamo.utils import counters

    plain = train(tiny_cfg, crop_loader, build, fit, "dino_vmf", {})
    torch._dynamo.reset()
    counters.clear()
    found = train(tiny_cfg, crop_loader, build, fit, "dino_vmf", {"compile": True, **switches})
    assert_equal(found, plain)
    assert not counters["graph_break"], counters["graph_break"]
    # student's first block (no stochastic depth), its others, the teacher's; two heads
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_networks__same_tokens_and_names(tiny_cfg, make_crops, build):
    module = build(tiny_cfg(), depth=2).eval()
    names = list(module.state_dict())
    crops = make_crops()[1]
    with torch.no_grad():
        expected = module.distillation_loss(crops).loss
        acceleration.compile_networks(module.backbone, module.head.mlp)
        module.centering.center.zero_()
        found = module.distillation_loss(crops).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert list(module.state_dict()) == names
    assert isinstance(module.backbone, type(module.momentum_backbone))


# ---- what cannot work ----------------------------------------------------------------------------


def test_grad_checkpointing__without_a_vit__named(tiny_cfg, build):
    cfg = tiny_cfg(**{"backbone.name": "resnet18", "backbone.kwargs": {}})
    cfg.performance = {"grad_checkpointing": True}
    with pytest.raises(ValueError, match=r"grad_checkpointing=True needs a Vision Transformer"):
        build(cfg)


def test_compile__without_a_compiler__named(tiny_cfg, build, monkeypatch):
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: None)
    cfg = tiny_cfg(accelerator="cpu")
    cfg.performance = {"compile": True}
    with pytest.raises(ValueError, match=r"performance.compile=True needs a C\+\+ compiler"):
        build(cfg)
