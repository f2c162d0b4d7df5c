"""ibot, ibot_vmf, msn and msn_vmf as whole runs: recipes, learning, precision, resuming."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

METHODS = ["ibot", "ibot_vmf", "msn", "msn_vmf"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = [
    f"{folder}/{path.stem}"
    for folder in ("imagenet", "imagenet-100", "custom")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if path.stem.startswith(("ibot", "msn"))
]


# ---- recipes -------------------------------------------------------------------------------------

SHRINK = {
    "backbone.name": "vit_tiny",
    "backbone.kwargs.img_size": 32,
    "optimizer.batch_size": 2,
    "max_epochs": 100,
    "accelerator": "cpu",
    "devices": "1",
    "strategy": "auto",
    "sync_batchnorm": False,
    "checkpoint.enabled": False,
    "method_kwargs.num_prototypes": 64,
    "method_kwargs.proj_hidden_dim": 32,
    "method_kwargs.proj_output_dim": 16,
    "method_kwargs.monitor": False,
}


def _compose(recipe: str) -> DictConfig:
    from hydra import compose, initialize_config_module

    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        cfg = compose(recipe, overrides=["data.train_path=unused", "data.val_path=null"])
    OmegaConf.set_struct(cfg, False)
    return cfg


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe__composes_and_holds_the_published_values(recipe):
    cfg = _compose(recipe)
    folder, name = recipe.split("/")
    family, size = name.split("_")[0], "b" if "vitb" in name else "s"
    kwargs, published = cfg.method_kwargs, folder == "imagenet"
    assert cfg.method == name.removesuffix("_vits16").removesuffix("_vitb16").removesuffix("_kp")
    assert kwargs.prototype_spread == (0.1 if "_kp" in name else 0)
    assert cfg.backbone.name == {"s": "vit_small", "b": "vit_base"}[size]
    assert sum(a.num_crops for a in cfg.augmentations) == 12
    assert sum(a.num_crops for a in cfg.augmentations if a.crop_size == 224) == 2
    assert (kwargs.student_temperature, kwargs.final_weight_decay) == (0.1, 0.4)
    assert (kwargs.proj_hidden_dim, kwargs.proj_output_dim) == (2048, 256)
    assert (cfg.optimizer.weight_decay, cfg.momentum.base_tau) == (0.04, 0.996)
    epochs = {("ibot", "s"): 800, ("ibot", "b"): 400, ("msn", "s"): 800, ("msn", "b"): 600}
    if published:
        assert cfg.max_epochs == epochs[family, size]
    assert (cfg.momentum.final_tau, cfg.scheduler.interval) == (1, "step")
    scales = [(a.rrc.crop_min_scale, a.rrc.crop_max_scale) for a in cfg.augmentations]
    vmf = "vmf" in name
    if family == "ibot":
        split = 0.32 if size == "b" else 0.25
        assert (scales[0], scales[-1]) == ((split, 1.0), (0.05, split))
        assert kwargs.normalization == ("vmf" if vmf else "l2" if size == "b" else "none")
        assert kwargs.centering == ("probability" if vmf else "logit")
        assert kwargs.num_prototypes == 8192
        assert (list(kwargs.pred_ratio), list(kwargs.pred_ratio_var)) == ([0, 0.3], [0, 0.2])
        assert kwargs.teacher_temperature == kwargs.teacher_patch_temperature == 0.07
        assert kwargs.warmup_teacher_patch_temperature == 0.04
        assert kwargs.warmup_teacher_temperature == 0.04
        values = (cfg.optimizer.lr, cfg.scheduler.min_lr, kwargs.clip_grad)
        assert values == ((7.5e-4, 2e-6, 0.3) if size == "b" else (5e-4, 1e-6, 3.0))
        assert kwargs.freeze_last_layer == (3 if size == "b" else 1)
        assert kwargs.warmup_teacher_temperature_epochs == (50 if size == "b" else 30)
        assert (kwargs.lambda1, kwargs.lambda2) == (1, 1)
        assert (kwargs.pred_shape, kwargs.pred_start_epoch) == ("block", 0)
        assert (kwargs.center_momentum, kwargs.patch_center_momentum) == (0.9, 0.9)
        assert (cfg.scheduler.warmup_epochs, cfg.scheduler.warmup_start_lr) == (10, 0)
        assert cfg.backbone.kwargs.drop_path_rate == 0.1
        assert not kwargs.use_bn_in_head
    else:
        assert (scales[0], scales[-1]) == ((0.3, 1.0), (0.05, 0.3))
        assert kwargs.normalization == ("vmf" if vmf else "l2")
        assert (kwargs.num_prototypes, kwargs.centering) == (1024, "sinkhorn")
        assert kwargs.patch_drop == (0.3 if size == "b" else 0.15)
        assert (kwargs.teacher_temperature, kwargs.clip_grad) == (0.025, 3.0)
        assert (cfg.scheduler.warmup_epochs, cfg.backbone.kwargs.drop_path_rate) == (15, 0.0)
        assert (kwargs.me_max_weight, kwargs.schedule_stretch) == (1, 1.25)
        assert (kwargs.sinkhorn_iterations, cfg.scheduler.min_lr) == (3, 1e-6)
        assert kwargs.use_bn_in_head
        assert cfg.sync_batchnorm
        for crop in cfg.augmentations:
            assert crop.rrc.interpolation == "bilinear"
            jitter = crop.color_jitter
            assert (jitter.prob, jitter.brightness, jitter.contrast) == (0.8, 0.4, 0.4)
            assert (jitter.saturation, jitter.hue, crop.gaussian_blur.prob) == (0.4, 0.1, 0.5)
            assert (crop.grayscale.prob, crop.solarization.prob) == (0.2, 0)
    if published:
        total = cfg.optimizer.batch_size * len(cfg.devices) * cfg.num_nodes
        assert total == (512 if name in ("ibot_vmf_vitb16", "ibot_vmf_kp_vitb16") else 1024)
        if family == "msn":
            assert cfg.optimizer.lr * total / 256 == pytest.approx(1e-3)
            assert cfg.scheduler.warmup_start_lr == 2e-4
    else:
        peak = cfg.optimizer.lr * cfg.optimizer.batch_size / 256
        assert cfg.scheduler.warmup_start_lr < peak


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("imagenet/")])
def test_recipe__shrunk__makes_a_step(recipe, make_crops, build):
    cfg = _compose(recipe)
    for key, value in SHRINK.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    cfg.data.update(num_classes=4, num_large_crops=2, num_small_crops=10)
    module = build(cfg)
    _, crops, _ = make_crops(batch=2, small=10)
    loss = module.distillation_loss(crops).loss
    loss.backward()
    module.configure_optimizers().step()
    assert torch.isfinite(loss)


# ---- learning ------------------------------------------------------------------------------------


def _structured_batches(steps: int, crops: tuple[int, int]) -> list[Any]:
    """Crops of a few smooth pictures: what two crops share can be learned."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(
        torch.randn(16, 3, 4, 4, generator=generator), size=64, mode="bicubic"
    )
    batches = []
    for _ in range(steps):
        chosen = pictures[torch.randperm(16, generator=generator)[:8]]
        views = []
        for size, count in zip((32, 16), crops, strict=True):
            for _ in range(count):
                top, left = torch.randint(0, 65 - size, (2,), generator=generator).tolist()
                views.append(chosen[:, :, top : top + size, left : left + size])
        batches.append([torch.arange(8), views, torch.zeros(8, dtype=torch.int64)])
    return batches


@pytest.mark.parametrize("method", METHODS)
def test_fit__twenty_steps__finite_and_falling(small_cfg, build, fit, method):
    cfg = small_cfg(
        method,
        max_epochs=1,
        **{
            "optimizer.lr": 1e-3,
            "method_kwargs.proj_hidden_dim": 64,
            "method_kwargs.monitor": True,
            "method_kwargs.monitor_every": 10,
        },
    )
    module, losses = build(cfg), []
    original = module.distillation_loss

    def recorded(crops: list[Tensor]) -> Any:
        out = original(crops)
        losses.append(float(out.loss.detach()))
        return out

    module.distillation_loss = recorded
    loader = torch.utils.data.DataLoader(_structured_batches(20, (2, 2)), batch_size=None)
    trainer = fit(module, loader)
    assert len(losses) == 20
    assert 0 < trainer.callback_metrics["monitor/teacher_entropy"] < math.log(32)
    first, last = torch.tensor(losses[:5]).mean(), torch.tensor(losses[-5:]).mean()
    assert torch.isfinite(torch.tensor(losses)).all()
    assert last < first - 0.02


@pytest.mark.parametrize("method", ["ibot_vmf", "msn_vmf"])
def test_fit__bf16__close_to_float32(small_cfg, make_crops, build, method):
    """Autocast changes products only: softmax, normalizer, centers and losses stay float32."""
    module = build(small_cfg(method, **{"backbone.kwargs.drop_path_rate": 0.0}))
    _, crops, _ = make_crops()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = copy.deepcopy(module).distillation_loss(crops)
        assert out.loss.dtype == torch.float32
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ibot_vmf", "msn"])
def test_resume__two_epochs__equal_one_plus_one(
    small_cfg, crop_loader, build, fit, tmp_path, method
):
    """Masks and dropped patches are drawn anew from the epoch and the batch: nothing is lost."""

    def run(stop: int, resume: str | None = None) -> Any:
        module = build(small_cfg(method, max_epochs=2, **{"optimizer.lr": 1e-3}))
        stopper = {"limit_train_batches": 1.0}
        if stop == 1:
            module.on_train_epoch_end = lambda: setattr(module.trainer, "should_stop", True)
        trainer = fit(module, crop_loader(steps=2), ckpt_path=resume, **stopper)
        path = tmp_path / f"{stop}-{resume is None}.ckpt"
        trainer.save_checkpoint(path)
        return str(path), module.state_dict()

    _, straight = run(2)
    half, _ = run(1)
    _, resumed = run(2, half)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", ["ibot_vmf", "msn_vmf"])
def test_checkpoint__backbone_and_head_are_read_back(
    small_cfg, crop_loader, build, fit, tmp_path, method
):
    from dinovmf_plugin.checkpoints import load_backbone, load_head

    module = build(small_cfg(method, max_epochs=1), depth=None)
    trainer = fit(module, crop_loader(steps=1))
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    vit, _ = load_backbone(path)
    head, settings = load_head(path)
    reference = module.momentum_backbone.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in vit.state_dict().items())
    prototypes = module.momentum_head.last_layer if "ibot" in method else module.prototypes
    assert torch.equal(head.last_layer.weight_g, prototypes.weight_g)
    assert torch.equal(head.mlp[0].weight, module.momentum_head.mlp[0].weight)
    assert (settings.method, settings.normalization) == (method, "vmf")
    assert settings.teacher_temperature == module.settings.teacher_temperature

    again = build(small_cfg(method, **{"method_kwargs.init_from": str(path)}), seed=1)
    assert torch.equal(again.student_prototypes.weight_v, prototypes.weight_v)
    assert torch.equal(again.momentum_head.mlp[0].weight, module.momentum_head.mlp[0].weight)
