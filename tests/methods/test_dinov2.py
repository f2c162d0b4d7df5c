"""DINOv2's training by its formulas: heads apart, KoLeo, rates by layer, clipping, a held last layer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core import vit as vits
from dinovmf_plugin.training.config import parse_cfg
from tests.methods.dinov2 import DINOV2

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TAU_S, TAU_CLS, TAU_PATCH = 0.1, 0.07, 0.05
EPOCHS, STEPS, BATCH, EPS = 2, 3, 3, 1e-4  # an eps that rounding cannot be blown up by


# ---- six steps against the formulas --------------------------------------------------------------


def _logits(y: Tensor, layer: Any, tau: float) -> Tensor:
    out = F.linear(y, F.normalize(layer.weight_v, dim=1) * layer.weight_g) / tau
    if layer.normalization == "vmf":  # log C_p by the paper's expansion, without constants
        nu, kappa = layer.dim / 2 - 1, layer.weight_g.abs().flatten() / tau
        s = (nu**2 + kappa**2).sqrt()
        out = out + nu * (nu + s).log() - s + 0.5 * s.log()
    return out


def _koleo(x: Tensor) -> Tensor:
    """- mean_i log min_{j != i} ||x_i - x_j||, pair by pair."""
    x, terms = x / x.norm(dim=1, keepdim=True), []
    for i in range(len(x)):
        terms.append(min((x[i] - x[j]).norm() for j in range(len(x)) if j != i).log())
    return -sum(terms) / len(x)


def _sinkhorn(scores: Tensor) -> Tensor:
    """Rows of equal mass, columns of equal mass, three times, on the exponentials themselves."""
    q = scores.double().exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * len(q)).to(scores.dtype)


class Plain:
    """The same training with a loop for everything and AdamW written out."""

    def __init__(self, module: Any, peak: float) -> None:
        self.module, self.s, self.peak = module, module.settings, peak
        self.centers: dict[str, Any] = {"cls": 0.0, "patch": 0.0}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def targets(self, head: Any, x: Tensor, tau: float, name: str) -> Tensor:
        logits = _logits(head(x), head.last_layer, tau)
        if self.s.centering == "sinkhorn":
            return _sinkhorn(logits)
        unit = tau if (self.s.centering, head.last_layer.normalization) == ("logit", "none") else 1
        out = (logits - self.centers[name] / unit).softmax(1)
        if self.s.centering == "logit":
            batch = logits.mean(0) * unit
        else:
            batch = logits.softmax(1).mean(0).log()
        self.centers[name] = 0.9 * self.centers[name] + 0.1 * batch
        return out

    def losses(self, crops: list[Tensor], masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, masks = self.module, masks.chunk(2)
        with torch.no_grad():
            tokens = [vits.forward_tokens(m.momentum_backbone, x) for x in crops[:2]]
            cls = torch.cat([t[:, 0] for t in tokens])
            cls = self.targets(m.momentum_head, cls, TAU_CLS, "cls").chunk(2)
            masked = torch.cat([t[:, 1:][k] for t, k in zip(tokens, masks, strict=True)])
            wanted = self.targets(m.momentum_patch_head, masked, TAU_PATCH, "patch")
        student = [
            vits.forward_tokens(m.backbone, x, masks=k, mask_token=m.mask_token)
            for x, k in zip(crops, masks, strict=False)
        ] + [vits.forward_tokens(m.backbone, x) for x in crops[2:]]
        views = [_logits(m.head(t[:, 0]), m.head.last_layer, TAU_S) for t in student]
        pairs = [(q, v) for q in range(2) for v in range(len(crops)) if q != v]
        dino = sum(-(cls[q] * views[v].log_softmax(1)).sum(1).mean() for q, v in pairs)
        ibot, row = torch.zeros(()), 0
        for view in range(2):
            patches = m.patch_head(student[view][:, 1:])
            logits = _logits(patches, m.patch_head.last_layer, TAU_S).log_softmax(-1)
            for image, mask in enumerate(masks[view]):
                for patch in mask.nonzero().flatten():
                    entropy = -(wanted[row] * logits[image, patch]).sum()
                    ibot = ibot + entropy / mask.sum() / (2 * BATCH)
                    row += 1
        koleo = sum(_koleo(t[:, 0]) for t in student[:2])
        for x in student[:2]:
            near = F.normalize(x[:, 0].detach(), dim=1) @ F.normalize(x[:, 0].detach(), dim=1).T
            first, second = near.fill_diagonal_(-1).topk(2, dim=1).values.unbind(1)
            assert (first - second).min() > 1e-4
        return dino / len(pairs), ibot, koleo

    def rate(self, name: str, step: int) -> float:
        """Warm-up over the first epoch, cosine to 1e-6; by layer; 0 for last layers in the first epoch."""
        if "last_layer" in name and step < STEPS:
            return 0.0
        total, depth = EPOCHS * STEPS, 2
        table = [self.peak * i / (STEPS - 1) for i in range(STEPS)]
        rest = np.arange(total - STEPS) / (total - STEPS)
        table += list(1e-6 + (self.peak - 1e-6) * (1 + np.cos(np.pi * rest)) / 2)
        layer = depth + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        if name.endswith(("cls_token", "pos_embed", "mask_token")) or "patch_embed" in name:
            layer = 0
        patch = 0.2 if "patch_embed" in name else 1.0
        return float(table[step] * patch * 0.9 ** (depth + 1 - layer))

    def step(self, crops: list[Tensor], masks: Tensor, step: int) -> tuple[float, float]:
        m, progress = self.module, step / (EPOCHS * STEPS)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        trained = {
            n: p
            for n, p in m.named_parameters()
            if p.requires_grad and not n.startswith(("classifier", "momentum"))
        }
        dino, ibot, koleo = self.losses(crops, masks)
        (dino + ibot + 0.1 * koleo).backward()
        for network in ("backbone", "head", "patch_head"):
            mine = [n for n in trained if n.startswith(network + ".")]
            mine += ["mask_token"] if network == "backbone" else []
            norm = math.sqrt(sum(float(trained[n].grad.square().sum()) for n in mine))
            for n in mine:
                trained[n].grad *= min(1.0, self.s.clip_grad / (norm + 1e-6))
        with torch.no_grad():
            for n, p in trained.items():
                first, second = self.moments.get(n, (torch.zeros_like(p), torch.zeros_like(p)))
                first, second = 0.9 * first + 0.1 * p.grad, 0.999 * second + 0.001 * p.grad**2
                self.moments[n] = first, second
                decay = 0.4 + (0.04 - 0.4) * cosine if p.ndim > 1 else 0.0
                rate, t = self.rate(n, step), step + 1
                p -= rate * decay * p
                p -= rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + EPS)
                p.grad = None
            momentum = 1 + (0.9 - 1) * cosine
            for n, p in trained.items():
                if n != "mask_token":
                    q = m.get_parameter("momentum_" + n)
                    q.copy_(momentum * q + (1 - momentum) * p)
        return float((dino + ibot).detach()), float(koleo.detach())


class Watch(Callback):
    """Loss, KoLeo and the teacher's center of patches after every batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        values = trainer.callback_metrics
        self.seen.append([float(values[k]) for k in ("train_loss_step", "train_koleo_loss")])


def _cfg(tiny_cfg: Any, method: str = "ibot", **more: Any) -> Any:
    return tiny_cfg(
        method,
        **DINOV2,
        **{
            "max_epochs": EPOCHS,
            "backbone.kwargs.patch_size": 8,
            "backbone.kwargs.drop_path_rate": 0.0,
            "optimizer.batch_size": 4,
            "optimizer.lr": 0.016 * 4 / 256,  # as the host scales it: 0.016 a batch of 1024
            "optimizer.kwargs": {"eps": EPS},
            "scheduler.warmup_epochs": 1,
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "data.num_small_crops": 1,
            "method_kwargs.proj_output_dim": 16,
            "method_kwargs.final_weight_decay": 0.4,
            "method_kwargs.freeze_last_layer": 1,
            "method_kwargs.clip_grad": 0.5,
            "method_kwargs.teacher_temperature": TAU_CLS,
            "method_kwargs.warmup_teacher_temperature_epochs": 0,
            "method_kwargs.teacher_patch_temperature": TAU_PATCH,
            **more,
        },
    )


@pytest.mark.parametrize(
    ("normalization", "centering"),
    [("none", "sinkhorn"), ("none", "logit"), ("vmf", "probability"), ("vmf", "sinkhorn")],
)
def test_fit__six_steps__equal_the_formulas(
    tiny_cfg, crop_loader, build, fit, normalization, centering
):
    """Losses, centers, and every parameter of student and teacher."""
    module = build(
        _cfg(
            tiny_cfg,
            **{
                "method_kwargs.normalization": normalization,
                "method_kwargs.centering": centering,
            },
        )
    )
    for i, head in enumerate(module.projection_heads):  # as after some training
        torch.manual_seed(i)
        torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2)
    with torch.no_grad():  # pictures far from each other: which is the nearest must not be a tie
        for network in (module.backbone, module.momentum_backbone):
            for p in network.parameters():
                p.mul_(4 if p.ndim > 1 else 1)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    plain = Plain(copy.deepcopy(module), peak=0.016 * math.sqrt(4 / 1024))
    drawn, draw = [], module.draw_masks
    module.draw_masks = lambda images: drawn.append(draw(images)) or drawn[-1]
    watch, loader = Watch(), crop_loader(steps=STEPS, batch=BATCH, small=1)
    fit(module, loader, callbacks=[watch])

    batches = [crops for _, crops, _ in loader] * EPOCHS
    assert len({int(masks.sum()) for masks in drawn}) > 1
    expected = [
        plain.step(crops, masks, i)
        for i, (crops, masks) in enumerate(zip(batches, drawn, strict=True))
    ]
    assert np.allclose(watch.seen, expected, rtol=1e-5, atol=1e-5), (watch.seen, expected)
    if centering != "sinkhorn":
        for own, name in ((module.centering, "cls"), (module.patch_centering, "patch")):
            difference = own.center.flatten() - plain.centers[name]
            assert (difference - difference.mean()).abs().max() < 1e-4  # up to log C_p's constant
    reference, moved = dict(plain.module.named_parameters()), 0.0
    for name, parameter in module.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(
                parameter, reference[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            moved = max(moved, float((parameter.detach() - start[name]).abs().max()))
    assert moved > 1e-3


# ---- the rates -----------------------------------------------------------------------------------


def test_rates__every_parameter_of_a_deep_vit__closed_formula(tiny_cfg, build):
    """DINOv2's numbers, layer by layer, registers and mask token included; heads and probe at 1."""
    cfg = _cfg(tiny_cfg, **{"backbone.name": "vit_tiny"})
    cfg.backbone.kwargs.reg_tokens = 4
    module = build(cfg, depth=None)
    assert len(module.backbone.blocks) == 12
    wanted = {"mask_token": 0.9**13}
    for name, _ in module.backbone.named_parameters():
        if name in ("cls_token", "pos_embed", "reg_token"):
            wanted[f"backbone.{name}"] = 0.9**13
    for part in ("weight", "bias"):
        wanted[f"backbone.patch_embed.proj.{part}"] = 0.2 * 0.9**13
        wanted[f"backbone.norm.{part}"] = 1.0
    for i in range(12):
        for name, _ in module.backbone.blocks[i].named_parameters():
            wanted[f"backbone.blocks.{i}.{name}"] = 0.9 ** (12 - i)
    names = {id(p): n for n, p in module.named_parameters()}
    found, held = {}, set()
    for group in module.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group.get("lr_scale", 1.0)
            if group.get("last_layer"):
                held.add(names[id(parameter)])
            assert group["decay"] is (
                parameter.ndim > 1 and not names[id(parameter)].startswith("classifier")
            )
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert {n for n in wanted if n not in trained} == set()
    for name, scale in found.items():
        assert scale == pytest.approx(wanted.get(name, 1.0), rel=1e-12), name
    assert {n for n in trained - wanted.keys() if n.startswith("backbone")} == set()
    heads = ("head", "patch_head")
    assert held == {f"{h}.last_layer.weight_{x}" for h in heads for x in "gv"}


@pytest.mark.parametrize(("batch", "devices"), [(4, 1), (16, 2)])
def test_peak__sqrt__of_the_batch_of_all_processes(tiny_cfg, tmp_path, build, batch, devices):
    cfg = tiny_cfg("dino_vmf", **{"method_kwargs.lr_scaling": "sqrt", "optimizer.lr": 4e-3})
    (tmp_path / "a").mkdir()
    cfg.data.train_path, cfg.devices, cfg.optimizer.batch_size = str(tmp_path), devices, batch
    cfg.data.num_classes = cfg.data.num_small_crops = None
    cfg.augmentations = OmegaConf.load(CONFIGS / "augmentations" / "dino_multicrop.yaml")
    module = build(parse_cfg(cfg))
    peaks = {g["name"]: g["peak_lr"] for g in module.configure_optimizers().param_groups}
    assert peaks.pop("classifier_no_decay") == 0.01
    assert list(peaks.values()) == pytest.approx(
        [4e-3 * math.sqrt(batch * devices / 1024)] * len(peaks)
    )


@pytest.mark.parametrize("scheduler", ["warmup_cosine", "none"])
def test_logged_rate__is_that_of_the_topmost_layer(tiny_cfg, crop_loader, build, fit, scheduler):
    more = {"scheduler.name": scheduler, "scheduler.warmup_epochs": 0, "max_epochs": 1}
    trainer = fit(build(_cfg(tiny_cfg, **more)), crop_loader(steps=1, small=1))
    assert float(trainer.callback_metrics["lr"]) == pytest.approx(0.016 * math.sqrt(4 / 1024))
    rates = {g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups}
    assert rates["backbone_layer2"] == pytest.approx(0.9 * 1e-3)
    assert rates["head"] == pytest.approx(1e-3)
    assert rates["patch_head_last_layer"] == 0


# ---- KoLeo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dino_multicrop", "ibot_vmf", "msn"])
def test_koleo__sum_over_global_crops_of_the_students_features(
    small_cfg, make_crops, build, method
):
    module = build(small_cfg(method, **{"method_kwargs.koleo_weight": 0.3}))
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.update_knn_bank = lambda *args: None
    out = module.distillation_loss(make_crops()[1])
    module.distillation_loss = lambda crops: out
    module.online_classifier_loss = lambda *args: 0.0
    total = module.training_step(make_crops(), 0)
    views = out.student_features.split(4)
    assert len(views) == (1 if method == "msn" else 2)  # MSN: its anchor
    expected = out.loss + 0.3 * sum(_koleo(view) for view in views)
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total - out.loss, out.student_features, retain_graph=True)
    (slow,) = torch.autograd.grad(expected - out.loss, out.student_features)
    torch.testing.assert_close(gradient, slow, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 0


# ---- heads apart ---------------------------------------------------------------------------------


def test_no_masked_patch__every_parameter_has_a_gradient(tiny_cfg, make_crops, build):
    """Processes must agree on it, whatever they mask; and the center has nothing to follow."""
    module = build(_cfg(tiny_cfg, "ibot_vmf"))
    module.draw_masks = lambda images: torch.zeros(len(images), 16, dtype=torch.bool)
    before = module.patch_centering.center.normal_().clone()
    loss = module.distillation_loss(make_crops(small=1)[1]).loss
    loss.backward()
    missing = [n for n, p in module.patch_head.named_parameters() if p.grad is None]
    assert missing == []
    assert torch.isfinite(loss)
    assert torch.equal(module.patch_centering.center, before)
    assert module.centering.center.abs().max() > 0


@pytest.mark.parametrize("batch_norm", [False, True])
def test_patch_center_tokens__masked__others_do_not_count(tiny_cfg, make_crops, build, batch_norm):
    """Equal targets and loss; the teacher's head sees masked patches alone (BatchNorm: all)."""
    _, crops, _ = make_crops(small=1)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    masks[::2, 3:9] = True
    outs, rows = {}, {}
    for tokens in ("all", "masked"):
        cfg = _cfg(tiny_cfg, "ibot_vmf", **{"method_kwargs.use_bn_in_head": batch_norm})
        cfg.method_kwargs.patch_center_tokens = tokens
        module = build(cfg)
        module.draw_masks = lambda images: masks
        seen = []
        module.momentum_patch_head.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(out)
        )
        outs[tokens] = module.distillation_loss(crops).loss
        rows[tokens] = torch.cat(seen)
        chosen = rows[tokens]
        if tokens == "masked" and batch_norm:
            chosen = chosen[masks.flatten()]
        layer = module.momentum_patch_head.last_layer
        p = layer(chosen, module.teacher_patch_temperature()).double().softmax(1).mean(0)
        torch.testing.assert_close(
            module.patch_centering.center.double().flatten(), 0.1 * p.log(), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(outs["masked"], outs["all"])
    assert len(rows["all"]) == 128
    assert len(rows["masked"]) == (128 if batch_norm else 24)


def test_spread__of_both_sets_of_prototypes(tiny_cfg, build):
    module = build(_cfg(tiny_cfg, "ibot_vmf", **{"method_kwargs.prototype_spread": 0.5}))
    expected = 0.5 * sum(_koleo(h.last_layer.weight_v) for h in (module.head, module.patch_head))
    torch.testing.assert_close(module.prototype_spread_loss(), expected)


@pytest.mark.parametrize("freeze_by", ["gradient", "rate"])
def test_last_layers__of_both_heads_stay_for_the_first_epoch_then_move(
    tiny_cfg, crop_loader, build, fit, freeze_by
):
    cfg = _cfg(tiny_cfg, "ibot_vmf", **{"scheduler.warmup_epochs": 0})
    cfg.method_kwargs.freeze_by = freeze_by
    module, seen = build(cfg), []
    layers = {
        n: p for n, p in module.named_parameters() if "last_layer" in n and "momentum" not in n
    }
    assert len(layers) == 4

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen.append({n: p.detach().clone() for n, p in layers.items()})

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            self.on_train_start(trainer, pl_module)
            state = trainer.optimizers[0].state
            self.moments = [bool(state.get(p)) for p in layers.values()]
            if trainer.current_epoch == 0:  # DINOv2's moments go on, DINO's do not begin
                assert self.moments == [freeze_by == "rate"] * 4

    fit(module, crop_loader(steps=2, small=1), callbacks=[Look()])
    for name in layers:
        assert torch.equal(seen[0][name], seen[1][name]), name
        assert not torch.equal(seen[1][name], seen[2][name]), name


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ibot", {"patch_head": "own"}, "patch_head='own' must be shared or separate"),
        ("ibot", {"num_patch_prototypes": 8}, "num_patch_prototypes=8 has no meaning with patch_h"),
        ("ibot", {"patch_center_tokens": "none"}, "patch_center_tokens='none' must be all or mask"),
        (
            "ibot_vmf",
            {"prototype_update": "em", "patch_head": "separate"},
            "prototype_update=em need",
        ),
        (
            "ibot",
            {"init_prototypes": "kmeans", "patch_head": "separate"},
            "init_prototypes=kmeans n",
        ),
        ("ibot_vmf", {"prototype_update": "em", "patch_center_tokens": "masked"}, "tokens=all: it"),
        (
            "ibot_vmf",
            {"prototype_update": "em", "freeze_by": "rate"},
            "freeze_by=rate has no meani",
        ),
        ("ibot", {"lr_scaling": "cubic"}, "lr_scaling='cubic' must be linear or sqrt"),
        ("ibot", {"layer_decay": 0.0}, "layer_decay=0.0 must be a number above 0 and at most 1"),
        ("ibot", {"patch_embed_lr_mult": 2}, "patch_embed_lr_mult=2 must be a number above 0"),
        ("ibot", {"koleo_weight": -1.0}, "koleo_weight=-1.0 must be a number of at least 0"),
        ("ibot", {"clip_by": "all"}, "clip_by='all' must be parameter or network"),
        ("ibot", {"freeze_by": "hand"}, "freeze_by='hand' must be gradient or rate"),
        ("dino_vmf", {"patch_head": "separate"}, "patch_head is no known key"),
        ("msn", {"clip_by": "network"}, "clip_by is no known key"),
    ],
)
def test_config__what_does_not_fit__is_named(small_cfg, build, method, changes, message):
    cfg = small_cfg(method, **{f"method_kwargs.{key}": value for key, value in changes.items()})
    with pytest.raises(ValueError, match=message) as error:
        build(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_decay": 0.9},
            "layer_decay=0.9 needs a Vision Transformer, but backbone.name is r",
        ),
        ({"patch_embed_lr_mult": 0.2}, "patch_embed_lr_mult=0.2 needs a Vision Transformer"),
    ],
)
def test_resnet__has_no_layers_in_a_row(tiny_cfg, build, changes, message):
    cfg = tiny_cfg("dino_vmf", **{f"method_kwargs.{k}": v for k, v in changes.items()})
    cfg.backbone = OmegaConf.create({"name": "resnet18", "kwargs": {}})
    with pytest.raises(ValueError, match=message):
        build(cfg)


def test_koleo__one_image_a_process__is_refused(tiny_cfg, build):
    cfg = _cfg(tiny_cfg, **{"optimizer.batch_size": 1})
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method_kwargs\.koleo_wei"):
        build(cfg)
