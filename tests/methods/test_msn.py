"""The wiring of msn and msn_vmf: which view is what, statistics of BatchNorm, and the optimizer's part."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.heads import ProjectionHead
from dinovmf_plugin.methods.msn import MSN, MSNvMF

TAU_S, TAU_T = 0.1, 0.025
CELLS = [("l2", "sinkhorn"), ("vmf", "sinkhorn"), ("vmf", "probability")]


@pytest.fixture
def msn_cfg(small_cfg) -> Any:
    """``small_cfg`` of ``msn`` if nothing else is said."""
    return lambda method="msn", **overrides: small_cfg(method, **overrides)


class Watch(Callback):
    """Keeps what ``look(module)`` returns after every training batch."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append(self.look(module))


# ---- what the names mean -------------------------------------------------------------------------


def test_methods__are_one_class_with_two_defaults(msn_cfg, build):
    vmf, plain = build(msn_cfg("msn_vmf")), build(msn_cfg("msn"))
    assert isinstance(vmf, MSNvMF)
    assert isinstance(plain, MSN)
    assert (vmf.settings.normalization, vmf.settings.centering) == ("vmf", "sinkhorn")
    assert (plain.settings.normalization, plain.settings.centering) == ("l2", "sinkhorn")
    assert vmf.prototypes.weight_g.requires_grad
    assert not plain.prototypes.weight_g.requires_grad


def test_prototypes__are_trained_undecayed_and_have_no_copy(msn_cfg, build):
    module = build(msn_cfg("msn_vmf"))
    assert isinstance(module.head, ProjectionHead)
    names = [name for name in module.state_dict() if "weight_v" in name]
    assert names == ["prototypes.weight_v"]
    options = {
        group["name"]: (group["decay"], len(group["params"]))
        for group in module.configure_optimizers().param_groups
    }
    assert options["prototypes_no_decay"] == (False, 2)
    assert "prototypes" not in options
    assert {name for name in module.momentum_head.state_dict() if name.startswith("mlp.")}
    bound = module.prototypes.weight_v.abs().max()  # uniform in +- 1 / sqrt(p)
    assert 0.9 / math.sqrt(8) < bound <= 1 / math.sqrt(8)


# ---- the loss and two steps by hand --------------------------------------------------------------


def slow_cls(vit, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """MSN's encoder: positions of other sizes by the plain factor sqrt(n / N), then patches are dropped."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    positions, patches = vit.pos_embed[:, 1:], x.shape[1]
    total = positions.shape[1]
    if patches != total:
        side = math.isqrt(total)
        grid = positions.transpose(1, 2).unflatten(2, (side, side))
        ratio = math.sqrt(patches / total)
        grid = F.interpolate(grid, scale_factor=ratio, mode="bicubic")
        positions = grid.flatten(2).transpose(1, 2)
    x = x + positions
    x = x if keep is None else x[:, keep]
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return vit.norm(vit.blocks(torch.cat([cls, x], dim=1)))[:, 0]


class SlowMSN:
    """MSN's training step view by view after its paper; the schedules written out."""

    def __init__(self, module: MSN, steps: int) -> None:
        self.module, self.total, self.count, self.center = module, 1.25 * steps, 0, 0.0
        groups = {True: [], False: []}
        self.encoder = [*module.backbone.parameters(), *module.head.parameters()]
        for p in self.encoder:
            groups[p.ndim > 1].append(p)
        prototypes = [p for p in module.prototypes.parameters() if p.requires_grad]
        groups[False] += prototypes
        self.optimizer = torch.optim.SGD([{"params": groups[True]}, {"params": groups[False]}])

    def logits(self, y: Tensor, tau: float) -> Tensor:
        layer = self.module.prototypes
        w = layer.weight_g.double() * F.normalize(layer.weight_v.double(), dim=-1)
        logits = y.double() @ w.T / tau
        if layer.normalization == "vmf":
            nu, kappa = layer.dim / 2 - 1, layer.weight_g.double().abs().flatten() / tau
            s = (nu**2 + kappa**2).sqrt()
            logits = logits + nu * (nu + s).log() - s + 0.5 * s.log()
        return logits

    def targets(self, crop: Tensor) -> Tensor:
        module = self.module
        cls = slow_cls(module.momentum_backbone, crop)
        p = self.logits(module.momentum_head(cls), TAU_T).softmax(-1)
        if module.settings.centering == "probability":
            targets = (p.log() - self.center).softmax(-1)
            self.center = 0.9 * self.center + 0.1 * p.mean(0).log()
            return targets
        q = p.T
        for _ in range(3):
            q = q / q.sum(dim=1, keepdim=True)
            q = q / q.sum(dim=0, keepdim=True)
        return q.T

    def step(self, crops: list[Tensor], keep: Tensor) -> float:
        module, s = self.module, self.module.settings
        with torch.no_grad():
            targets = self.targets(crops[0])
        anchor = module.head(slow_cls(module.backbone, crops[1], keep))
        # focal crops share one pass of the head, hence BatchNorm's statistics
        focal = [slow_cls(module.backbone, x) for x in crops[2:]]
        views = [anchor, *module.head(torch.cat(focal)).chunk(len(focal))]
        log_p = torch.stack([self.logits(y, TAU_S).log_softmax(-1) for y in views])
        mean = log_p.exp().mean(dim=(0, 1))
        gap = math.log(len(mean)) + (mean * mean.log()).sum()
        loss = -(targets * log_p).sum(-1).mean() + s.me_max_weight * gap

        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.encoder]).norm()
        for p in self.encoder:
            p.grad *= min(1.0, s.clip_grad / float(norm + 1e-6))
        progress = self.count / self.total
        # one epoch of warm-up: four values from 0.01 to the peak; then the stretched cosine
        fall = max(self.count - 4, 0) / (self.total - 4)
        for group, decay in zip(self.optimizer.param_groups, (True, False), strict=True):
            group["lr"] = 1e-6 + (0.1 - 1e-6) * (1 + math.cos(math.pi * fall)) / 2
            if self.count < 4:
                group["lr"] = (0.01, 0.04, 0.07, 0.1)[self.count]
            wd = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * progress)) / 2
            group["weight_decay"] = wd if decay else 0.0
        self.optimizer.step()
        momentum = 0.9 + 0.1 * progress
        with torch.no_grad():
            for student, teacher in (
                (module.backbone, module.momentum_backbone),
                (module.head, module.momentum_head),
            ):
                for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
                    q.copy_(momentum * q + (1 - momentum) * p)
        self.count += 1
        return float(loss.detach())


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_fit__eight_steps__equals_slow_loop(
    msn_cfg, crop_loader, build, fit, normalization, centering
):
    """Losses and all parameters; the schedules run over 10 steps, of which 8 are made in 2 epochs."""
    cfg = msn_cfg(
        "msn",
        **{
            "max_epochs": 2,
            "scheduler.warmup_epochs": 1,
            "scheduler.warmup_start_lr": 0.01,
            "backbone.kwargs.drop_path_rate": 0.0,
            "optimizer.name": "sgd",
            "optimizer.lr": 0.1,
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "method_kwargs.normalization": normalization,
            "method_kwargs.proj_output_dim": 16,  # from here on D is the paper's expansion
            "method_kwargs.centering": centering,
            "method_kwargs.patch_drop": 0.3,
            "method_kwargs.me_max_weight": 0.7,
            "method_kwargs.clip_grad": 0.5,
            "method_kwargs.final_weight_decay": 0.4,
        },
    )
    module = build(cfg)
    for network in (
        module.backbone,
        module.momentum_backbone,
    ):  # large enough for the resampling to matter
        with torch.no_grad():
            network.pos_embed.copy_(
                torch.randn(network.pos_embed.shape, generator=torch.Generator())
            )
    if normalization == "vmf":
        torch.nn.init.uniform_(module.prototypes.weight_g, 0.5, 3)
    slow = SlowMSN(copy.deepcopy(module), steps=8)
    kept, draw = [], module.draw_kept_patches
    module.draw_kept_patches = lambda images: kept.append(draw(images)) or kept[-1]
    losses = Watch(lambda m: float(m.trainer.callback_metrics["train_loss_step"]))
    loader = crop_loader(steps=4)
    fit(module, loader, callbacks=[losses])

    assert [len(keep) for keep in kept] == [math.floor(0.7 * 16)] * 8
    assert len({tuple(keep.tolist()) for keep in kept}) > 1
    crops = [batch[1] for batch in loader] * 2
    expected = [slow.step(x, keep) for x, keep in zip(crops, kept, strict=True)]
    assert losses.seen == pytest.approx(expected, rel=1e-4)
    reference = (
        slow.module.state_dict()
    )  # with BatchNorm's running statistics, of the teacher's too
    for name, value in module.state_dict().items():
        if not name.startswith(("classifier", "centering")):
            torch.testing.assert_close(
                value, reference[name], rtol=2e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- views ---------------------------------------------------------------------------------------


def test_views__target_to_the_teacher_anchors_to_the_student(
    msn_cfg, make_crops, build, monkeypatch
):
    module = build(msn_cfg())
    seen, embed = [], backbones.embed

    def spy(vit, images, masks=None, mask_token=None, keep=None):
        seen.append((vit is module.backbone, images, None if keep is None else len(keep)))
        return embed(vit, images, masks, mask_token, keep)

    monkeypatch.setattr(backbones, "embed", spy)
    _, crops, _ = make_crops(batch=4, small=3)
    module.distillation_loss(crops)
    teacher, anchor, focal = seen  # one batch of each size
    assert (teacher[0], teacher[2]) == (False, None)
    assert torch.equal(teacher[1], crops[0])
    assert (anchor[0], anchor[2]) == (True, math.floor(0.85 * 16))
    assert torch.equal(anchor[1], crops[1])
    assert (focal[0], focal[2]) == (True, None)
    assert torch.equal(focal[1], torch.cat(crops[2:]))
    assert module.last_step.student_embeddings.shape[:2] == (4, 4)


def test_kept_patches__same_on_every_rank_new_in_every_batch(msn_cfg, build, monkeypatch):
    module, images = build(msn_cfg()), torch.zeros(1, 3, 224, 224)
    first = module.draw_kept_patches(images)
    monkeypatch.setattr(type(module), "global_rank", 1)
    assert torch.equal(first, module.draw_kept_patches(images))
    module._batch_index = 1
    assert not torch.equal(first, module.draw_kept_patches(images))


def test_heads__use_batch_statistics_in_training_only(msn_cfg, crop_loader, build, fit):
    module = build(msn_cfg())
    modes = Watch(lambda m: {x.training for x in m.momentum_head.modules()})
    before = module.momentum_head.state_dict()["mlp.1.running_mean"].clone()
    fit(module, crop_loader(steps=1), callbacks=[modes], max_epochs=1)
    assert modes.seen == [{True}]
    after = module.momentum_head.state_dict()["mlp.1.running_mean"]
    assert not torch.equal(before, after)  # of its own batches: buffers are not averaged
    assert not torch.equal(after, module.head.state_dict()["mlp.1.running_mean"])


def test_batch_norm__of_both_heads_is_synchronized_by_the_recipes(build, tmp_path):
    from hydra import compose, initialize_config_module

    from dinovmf_plugin.pretraining import build_trainer
    from dinovmf_plugin.training.config import parse_cfg

    (tmp_path / "class").mkdir()
    overrides = [f"data.train_path={tmp_path}", f"+checkpoint.folder={tmp_path}", "strategy=ddp"]
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        cfg = compose("custom/msn", overrides=[*overrides, "backbone.name=vit_tiny"])
    cfg = parse_cfg(cfg)
    trainer = build_trainer(cfg)
    module = trainer.strategy._layer_sync.apply(build(cfg))  # what Lightning does before training
    for head in (module.head, module.momentum_head):
        kinds = [type(x) for x in head.modules() if "Norm" in type(x).__name__]
        assert kinds == [torch.nn.SyncBatchNorm] * 2


def test_momentum__is_a_line_that_the_run_does_not_finish(msn_cfg, build, monkeypatch):
    module = build(msn_cfg(momentum={"base_tau": 0.996, "final_tau": 1.0}))
    monkeypatch.setattr(MSN, "total_steps", 800)
    assert module.schedule_steps == 1000
    assert module.teacher_momentum(0) == 0.996
    assert module.teacher_momentum(500) == pytest.approx(0.998)
    assert module.teacher_momentum(800) == pytest.approx(0.9992)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.name", "resnet18", "backbone.name='resnet18' cannot train msn"),
        ("optimizer.batch_size", 1, "optimizer.batch_size=1 is too small for msn"),
        ("data.num_large_crops", 3, "augmentations give 3 large crops, but msn needs 2"),
        ("sync_batchnorm", True, "devices=2 on CPUs cannot have sync_batchnorm=True"),
        ("method_kwargs.patch_drop", 1.0, "method_kwargs.patch_drop=1.0"),
        ("method_kwargs.schedule_stretch", 0.5, "method_kwargs.schedule_stretch=0.5"),
        ("method_kwargs.teacher_temperature", 0.1, "teacher_temperature=0.1"),
        ("method_kwargs.freeze_last_layer", 1, "method_kwargs.freeze_last_layer is no known key"),
        ("method_kwargs.decay_magnitudes", True, "method_kwargs.decay_magnitudes is no known key"),
    ],
)
def test_config__impossible_value__is_named(msn_cfg, build, key, value, message):
    cfg = msn_cfg()
    from omegaconf import OmegaConf

    OmegaConf.update(cfg, key, value, force_add=True)
    cfg.devices = 2
    with pytest.raises(ValueError, match=message):
        build(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is a GPU here")
def test_sync_batchnorm__auto_accelerator_without_a_gpu__is_named(msn_cfg, build):
    cfg = msn_cfg(**{"accelerator": "auto", "sync_batchnorm": True, "devices": 2})
    with pytest.raises(ValueError, match="devices=2 on CPUs cannot have sync_batchnorm=True"):
        build(cfg)
