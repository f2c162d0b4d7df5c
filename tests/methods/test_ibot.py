"""The wiring of ibot and ibot_vmf: masks, tokens, both losses, and what the optimizer does."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.methods.dino import DINOMultiCrop
from dinovmf_plugin.methods.ibot import IBOT, IBOTvMF

CELLS = [("none", "logit"), ("vmf", "probability"), ("l2", "sinkhorn")]  # tests/losses has all nine
TAU_S, TAU_CLS, TAU_PATCH = 0.1, 0.07, 0.05
PLAIN = {  # what a slow loop can follow step by step
    "backbone.kwargs.drop_path_rate": 0.0,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.weight_decay": 0.01,
    "scheduler.name": "none",
    "momentum": {"base_tau": 0.9, "final_tau": 0.9},
    "method_kwargs.teacher_temperature": TAU_CLS,
    "method_kwargs.teacher_patch_temperature": TAU_PATCH,
    "method_kwargs.pred_ratio": [0.0, 0.5],
    "method_kwargs.pred_ratio_var": [0.0, 0.25],
    "method_kwargs.pred_shape": "rand",
}


class Watch(Callback):
    """Keeps what ``look(module)`` returns after every training batch."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append(self.look(module))


def _spread_prototypes(module: IBOT) -> None:
    for i, head in enumerate((module.head, module.momentum_head)):  # as after some training
        torch.manual_seed(i)
        torch.nn.init.uniform_(head.last_layer.weight_v, -1, 1)
        if head.last_layer.normalization != "l2":
            torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 3)


# ---- what the names mean -------------------------------------------------------------------------


def test_methods__are_one_class_with_two_defaults(tiny_cfg, build):
    vmf, plain = build(tiny_cfg("ibot_vmf")), build(tiny_cfg("ibot"))
    assert isinstance(vmf, IBOTvMF)
    assert isinstance(plain, IBOT)
    assert issubclass(IBOT, DINOMultiCrop)
    assert type(vmf).distillation_loss is type(plain).distillation_loss
    assert (vmf.settings.normalization, vmf.settings.centering) == ("vmf", "probability")
    assert (plain.settings.normalization, plain.settings.centering) == ("none", "logit")
    assert type(vmf.patch_centering) is type(vmf.centering)
    assert vmf.patch_centering is not vmf.centering


def test_mask_token__belongs_to_the_student_and_is_decayed(tiny_cfg, build):
    module = build(tiny_cfg("ibot"))
    assert module.mask_token.shape == (1, 1, module.features_dim)
    assert not module.mask_token.any()
    names = [name for name in module.state_dict() if "mask_token" in name]
    assert names == ["mask_token"]
    groups = [
        group
        for group in module.configure_optimizers().param_groups
        if any(p is module.mask_token for p in group["params"])
    ]
    assert [group["decay"] for group in groups] == [True]


# ---- the loss and a step by hand -----------------------------------------------------------------


def _slow_logits(y: Tensor, layer, tau: float) -> Tensor:
    w = layer.weight_g.double() * F.normalize(layer.weight_v.double(), dim=-1)
    logits = y.double() @ w.T / tau
    if layer.normalization == "vmf":  # log C_p by the paper's expansion, without constants
        nu, kappa = layer.dim / 2 - 1, layer.weight_g.double().abs().flatten() / tau
        s = (nu**2 + kappa**2).sqrt()
        logits = logits + nu * (nu + s).log() - s + 0.5 * s.log()
    return logits


class SlowIBOT:
    """iBOT's training step view by view, image by image, pair by pair, after its paper."""

    def __init__(self, module: IBOT) -> None:
        self.module, self.s = module, module.settings
        self.centers = {"cls": 0.0, "patch": 0.0}
        self.optimizer = None

    def targets(self, y: Tensor, tau: float, name: str, used: Tensor | None = None) -> Tensor:
        """Targets of the rows that are ``used``; the center sees all of them, afterwards."""
        layer, centering = self.module.momentum_head.last_layer, self.s.centering
        l_t = _slow_logits(y, layer, tau)
        rows = l_t if used is None else l_t[used]
        unit = tau if centering == "logit" and layer.normalization != "vmf" else 1.0
        if centering == "sinkhorn":
            for _ in range(3):
                rows = rows - rows.logsumexp(0, keepdim=True)
                rows = rows - rows.logsumexp(1, keepdim=True)
            return rows.exp()
        targets = (rows - self.centers[name] / unit).softmax(-1)
        batch = l_t.mean(0) * unit if centering == "logit" else l_t.softmax(-1).mean(0).log()
        self.centers[name] = 0.9 * self.centers[name] + 0.1 * batch
        return targets

    def loss(self, crops: list[Tensor], masks: Tensor) -> Tensor:
        module = self.module
        masks = masks.chunk(2)
        with torch.no_grad():
            tokens = [backbones.forward_tokens(module.momentum_backbone, x) for x in crops[:2]]
            y = [module.momentum_head(t) for t in tokens]
            cls = self.targets(torch.cat([x[:, 0] for x in y]), TAU_CLS, "cls").chunk(2)
            patches = torch.cat([x[:, 1:] for x in y]).flatten(0, 1)
            used = torch.cat(masks).flatten()
            t_patch = self.targets(patches, TAU_PATCH, "patch", used)
        views, masked = [], []
        for i, crop in enumerate(crops):
            options = {"masks": masks[i], "mask_token": module.mask_token} if i < 2 else {}
            y = module.head(backbones.forward_tokens(module.backbone, crop, **options))
            views.append(_slow_logits(y[:, 0], module.head.last_layer, TAU_S).log_softmax(-1))
            if i < 2:
                patch_logits = _slow_logits(y[:, 1:], module.head.last_layer, TAU_S)
                masked.append(patch_logits.log_softmax(-1))
        pairs = [(q, v) for q in range(2) for v in range(len(crops)) if q != v]
        cls_loss = sum(-(cls[q] * views[v]).sum(-1).mean() for q, v in pairs) / len(pairs)
        patch_loss, row = 0.0, 0
        for view in range(2):
            for image, mask in enumerate(masks[view]):
                for patch in mask.nonzero().flatten():
                    ce = -(t_patch[row] * masked[view][image, patch]).sum()
                    patch_loss = patch_loss + ce / mask.sum() / len(crops[0]) / 2
                    row += 1
        assert row == len(t_patch)
        return self.s.lambda1 * cls_loss + self.s.lambda2 * patch_loss

    def step(self, crops: list[Tensor], masks: Tensor) -> float:
        module = self.module
        trained = {
            n: p
            for n, p in module.named_parameters()
            if p.requires_grad and not n.startswith(("classifier", "momentum"))
        }
        if self.optimizer is None:
            decayed = [p for n, p in trained.items() if p.ndim > 1 and not n.endswith("bias")]
            rest = [p for n, p in trained.items() if p.ndim <= 1 or n.endswith("bias")]
            self.optimizer = torch.optim.SGD(
                [{"params": decayed, "weight_decay": 0.01}, {"params": rest}], lr=0.1, momentum=0.9
            )
        self.optimizer.zero_grad()
        loss = self.loss(crops, masks)
        loss.backward()
        for p in trained.values():
            p.grad *= min(1.0, float(self.s.clip_grad / (p.grad.norm() + 1e-6)))
        self.optimizer.step()
        with torch.no_grad():
            for student, teacher in module.momentum_pairs:
                for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
                    q.copy_(0.9 * q + 0.1 * p)
        return float(loss.detach())


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_fit__two_steps__equals_slow_loop(
    tiny_cfg, crop_loader, build, fit, normalization, centering
):
    """Losses, centers, and all parameters of student and teacher."""
    cfg = tiny_cfg(
        "ibot",
        **PLAIN,
        **{
            "max_epochs": 1,
            "method_kwargs.normalization": normalization,
            "method_kwargs.proj_output_dim": 16,  # from here on D is the paper's expansion
            "method_kwargs.centering": centering,
            "method_kwargs.lambda1": 0.7,
            "method_kwargs.lambda2": 1.3,
            "method_kwargs.clip_grad": 0.05,
            "optimizer.kwargs": {"momentum": 0.9},
            "data.num_small_crops": 1,
        },
    )
    module = build(cfg)
    _spread_prototypes(module)
    slow = SlowIBOT(copy.deepcopy(module))
    drawn, draw = [], module.draw_masks
    module.draw_masks = lambda images: drawn.append(draw(images)) or drawn[-1]
    losses = Watch(lambda m: float(m.trainer.callback_metrics["train_loss_step"]))
    loader = crop_loader(steps=2, batch=3, small=1)
    fit(module, loader, callbacks=[losses])

    assert len(drawn) == 2
    assert all(0 < int(masks.sum()) < masks.numel() for masks in drawn)
    expected = [slow.step(crops, masks) for (_, crops, _), masks in zip(loader, drawn, strict=True)]
    assert losses.seen == pytest.approx(expected, rel=2e-5)
    if centering != "sinkhorn":
        for own, name in ((module.centering, "cls"), (module.patch_centering, "patch")):
            difference = own.center.double().flatten() - slow.centers[name]
            assert (difference - difference.mean()).abs().max() < 1e-4  # up to log C_p's constant
    reference = dict(slow.module.named_parameters())
    for name, parameter in module.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(
                parameter, reference[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert module.mask_token.abs().max() > 0


def test_loss__first_step__vmf_equals_none_up_to_the_centering(tiny_cfg, make_crops, build):
    """All magnitudes are 1 at the start: the normalizer is a constant."""
    _, crops, _ = make_crops()
    losses = []
    for normalization in ("none", "vmf"):
        cfg = tiny_cfg("ibot", **PLAIN, **{"method_kwargs.normalization": normalization})
        losses.append(build(cfg).distillation_loss(crops).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_batch_norm__cls_and_patches_apart_alike_in_student_and_teacher(
    tiny_cfg, make_crops, build
):
    """At the start both networks are the same: on whole images they must give the same."""
    overrides = {**PLAIN, "method_kwargs.use_bn_in_head": True, "data.num_small_crops": 0}
    module = build(tiny_cfg("ibot_vmf", **overrides, **{"backbone.kwargs.patch_size": 8}))
    images = torch.cat(make_crops()[1][:2])
    _, cls, patches = module.teacher_tokens(images)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    _, student_cls, masked = module.student_embeddings(
        images, masks, masks.flatten().nonzero().squeeze(1), []
    )
    torch.testing.assert_close(student_cls, cls)
    assert masked.shape == (0, 8)
    with torch.no_grad():  # a mask that changes nothing but what is looked at
        tokens = backbones.forward_tokens(module.backbone, images)
        expected = module.head(tokens[:, 1:].flatten(0, 1))
    torch.testing.assert_close(patches, expected)
    masks[::3, 5] = True
    _, student_cls, masked = module.student_embeddings(
        images, masks, masks.flatten().nonzero().squeeze(1), []
    )
    assert masked.shape == (3, 8)
    assert not torch.allclose(student_cls, cls)


def test_normalizer__two_teacher_temperatures__two_concentrations(tiny_cfg, make_crops, build):
    module = build(tiny_cfg("ibot_vmf", **PLAIN))
    asked, layer = [], module.momentum_head.last_layer
    original = layer.log_normalizer
    layer.log_normalizer = lambda tau: asked.append(tau) or original(tau)
    module.distillation_loss(make_crops()[1])
    assert set(asked) == {TAU_CLS, TAU_PATCH}


# ---- masks ---------------------------------------------------------------------------------------


def test_pred_start_epoch__delays_masks_and_the_patch_temperature(
    tiny_cfg, crop_loader, build, fit
):
    cfg = tiny_cfg(
        "ibot",
        **{
            "max_epochs": 5,
            "data.num_small_crops": 0,
            "method_kwargs.pred_start_epoch": 2,
            "method_kwargs.pred_ratio": [0.5],
            "method_kwargs.pred_ratio_var": [0.0],
            "method_kwargs.pred_shape": "rand",
            "method_kwargs.warmup_teacher_temperature_epochs": 3,
            "method_kwargs.teacher_patch_temperature": 0.06,
        },
    )
    names = ("mask_ratio", "teacher_temperature", "teacher_patch_temperature")
    watch = Watch(lambda m: [float(m.trainer.callback_metrics[n]) for n in names])
    fit(build(cfg), crop_loader(steps=1, small=0), callbacks=[watch])
    ratios, cls, patch = zip(*watch.seen, strict=True)
    assert ratios == (0, 0, 0.5, 0.5, 0.5)
    assert cls == pytest.approx((0.04, 0.055, 0.07, 0.07, 0.07))
    assert patch == pytest.approx((0.04, 0.04, 0.04, 0.05, 0.06))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.name", "resnet18", "backbone.name='resnet18' cannot train ibot"),
        ("method_kwargs.pred_ratio", [0.3], "one variance for every ratio"),
        ("method_kwargs.pred_ratio", 0.3, "method_kwargs.pred_ratio"),
        ("method_kwargs.pred_shape", "stripes", "pred_shape='stripes'"),
        ("method_kwargs.lambda2", -1.0, "method_kwargs.lambda2=-1.0"),
        ("method_kwargs.teacher_patch_temperature", 0.2, "teacher_patch_temperature=0.2"),
        ("method_kwargs.patch_center_momentum", 1.0, "patch_center_momentum=1.0"),
        ("method_kwargs.patch_drop", 0.1, "method_kwargs.patch_drop is no known key"),
    ],
)
def test_config__impossible_value__is_named(tiny_cfg, build, key, value, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_cfg("ibot", **{key: value}))
