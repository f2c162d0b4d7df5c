"""Every precision trains, and extreme prototypes stay finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

METHODS = ["dino_multicrop", "dino_vmf", "ibot", "ibot_vmf", "msn", "msn_vmf"]
# on a CPU Lightning takes bf16-mixed for 16-mixed, with a warning
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


@pytest.fixture
def cfg_of(tiny_cfg) -> Any:
    def make(method: str, **more: Any) -> Any:
        cfg = tiny_cfg(
            method,
            **{
                "backbone.kwargs.patch_size": 8,
                "optimizer.lr": 2e-3,
                "max_epochs": 1,
                "data.num_small_crops": 1,
                **more,
            },
        )
        if method.startswith("msn"):
            del cfg.method_kwargs["freeze_last_layer"]
        return cfg

    return make


def _tensors(module: Any, trainer: Any = None) -> dict[str, torch.Tensor]:
    found = dict(module.state_dict())
    for i, state in enumerate(trainer.optimizers[0].state.values() if trainer else ()):
        found |= {f"optimizer {i} {key}": value for key, value in state.items()}
    return {name: value for name, value in found.items() if value.is_floating_point()}


def _check_hundred_steps(
    module: Any, fit: Any, loader: Any, precision: str, **trainer: Any
) -> None:
    losses, loss = [], module.distillation_loss
    module.distillation_loss = lambda crops: losses.append(out := loss(crops)) or out
    trained = fit(module, loader, precision=precision, **trainer)
    assert trained.global_step == len(losses) == 100
    assert all(bool(out.loss.isfinite()) for out in losses)
    for name, value in _tensors(module, trained).items():
        assert value.isfinite().all(), name
    exact = ("center", "weight_g")
    for name, value in module.state_dict().items():
        if name.endswith(exact):
            assert value.dtype == torch.float32, name
    magnitudes = module.student_prototypes.weight_g
    assert magnitudes.requires_grad == (module.settings.normalization != "l2")
    if magnitudes.requires_grad:  # really trained, in steps finer than bfloat16's
        moved = (magnitudes.detach() - 1).abs()
        assert moved.min() > 0
        assert not torch.equal(magnitudes, magnitudes.bfloat16().float())


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("dino_vmf", "bf16-mixed"),
        ("dino_vmf", "bf16-true"),
        ("msn_vmf", "bf16-true"),
    ],
)
def test_hundred_steps__finite(method, precision, cfg_of, build, fit, crop_loader):
    module = build(cfg_of(method), depth=1)
    loader = crop_loader(100, batch=3, small=1)
    _check_hundred_steps(module, fit, loader, precision)
    if precision == "bf16-true":
        assert module.backbone.cls_token.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_hundred_steps__every_method__finite(method, precision, cfg_of, build, fit, crop_loader):
    _check_hundred_steps(build(cfg_of(method)), fit, crop_loader(100, small=1), precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["dino_vmf", "ibot_vmf", "msn"])
def test_gpu__hundred_steps__finite(method, precision, cfg_of, build, fit, crop_loader):
    module = build(cfg_of(method))
    _check_hundred_steps(module, fit, crop_loader(100, small=1), precision, accelerator="gpu")


# ---- extreme prototypes --------------------------------------------------------------------------


@torch.no_grad()
def _push_to_the_anti_mean(module: Any, crops: list[torch.Tensor]) -> None:
    """99 % of the prototypes around minus the mean embedding, norms from 1e-4 to 1e4 for all."""
    generator = torch.Generator().manual_seed(0)
    mean = module.momentum_forward(crops[0])["z"].float().mean(dim=0)
    layers = {module.student_prototypes}
    if hasattr(module.momentum_head, "last_layer"):
        layers.add(module.momentum_head.last_layer)
    for layer in layers:
        many = layer.num_prototypes * 99 // 100
        noise = torch.randn(many, layer.dim, generator=generator)
        layer.weight_v[:many] = (-mean + 1e-3 * noise).to(layer.weight_v)
        if layer.normalization != "l2":
            norms = torch.logspace(-4, 4, layer.num_prototypes).flip(0)
            signs = torch.where(torch.arange(layer.num_prototypes) % 7 == 3, -1.0, 1.0)
            layer.weight_g[:, 0] = (norms * signs).to(layer.weight_g)


def _check_extreme(cfg: Any, build: Any, fit: Any, batches: list[Any], **trainer: Any) -> None:
    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    assert parameter.grad.isfinite().all(), name

    cfg.method_kwargs.num_prototypes = 200
    module = build(cfg, depth=1)
    _push_to_the_anti_mean(module, batches[0][1])
    before = _tensors(module)["head.mlp.0.weight"].clone()
    watch = [] if trainer.get("precision") == "16-mixed" else [Watch()]  # fp16 skips such steps
    trained = fit(module, batches, callbacks=watch, **trainer)
    assert trained.global_step == len(batches)
    for name, value in _tensors(module, trained).items():
        assert value.isfinite().all(), name
    if trainer.get("precision") != "16-mixed":
        after = module.head.mlp[0].weight.detach().cpu().float()
        assert not torch.equal(before, after)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("centering", ["logit", "probability", "sinkhorn"])
@pytest.mark.parametrize("method", ["dino_multicrop", "dino_vmf", "ibot_vmf", "msn_vmf"])
def test_extreme_prototypes__nothing_overflows(
    method, centering, precision, cfg_of, build, fit, make_crops
):
    cfg = cfg_of(method, **{"method_kwargs.centering": centering})
    batches = [make_crops(batch=3, small=1, seed=i) for i in range(3)]
    _check_extreme(cfg, build, fit, batches, precision=precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu__extreme_prototypes__nothing_overflows(precision, cfg_of, build, fit, make_crops):
    batches = [make_crops(small=1, seed=i) for i in range(20)]
    _check_extreme(cfg_of("ibot_vmf"), build, fit, batches, precision=precision, accelerator="gpu")
