"""The wiring of dino_multicrop and dino_vmf: which crops go where, and what the loss is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import log_normalizer
from dinovmf_plugin.methods.crops import forward_by_size
from dinovmf_plugin.methods.dino import DINOMultiCrop, DINOvMF

CELLS = [(n, c) for n in ("none", "l2", "vmf") for c in ("logit", "probability", "sinkhorn")]


class Watch(Callback):
    """Keeps what ``look(module)`` returns after every training batch."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append(self.look(module))


def _cell(normalization: str, centering: str) -> dict[str, str]:
    return {"method_kwargs.normalization": normalization, "method_kwargs.centering": centering}


# ---- what the names mean -------------------------------------------------------------------------


def test_methods__are_one_class_with_two_defaults(tiny_cfg, build):
    vmf, dino = build(tiny_cfg("dino_vmf")), build(tiny_cfg("dino_multicrop"))
    assert isinstance(vmf, DINOvMF)
    assert isinstance(dino, DINOMultiCrop)
    assert type(dino).distillation_loss is type(vmf).distillation_loss
    assert (vmf.settings.normalization, vmf.settings.centering) == ("vmf", "probability")
    assert (dino.settings.normalization, dino.settings.centering) == ("none", "logit")


def test_cells__are_two_config_keys(tiny_cfg, build):
    for normalization, centering in CELLS:
        module = build(tiny_cfg("dino_multicrop", **_cell(normalization, centering)))
        assert module.head.last_layer.normalization == normalization
        assert module.momentum_head.last_layer.normalization == normalization
        assert type(module.centering).__name__.lower() == f"{centering}centering"
        free = module.head.last_layer.weight_g.requires_grad
        assert free is (normalization != "l2")


@pytest.mark.parametrize(("normalization", "centering"), CELLS)
def test_loss__every_cell_two_steps__equals_plain_formula(
    tiny_cfg, make_crops, build, fit, normalization, centering
):
    """The method's own loss, from its embeddings, in float64 and pair by pair, the center included."""
    cfg = tiny_cfg(
        **_cell(normalization, centering),
        **{"backbone.kwargs.drop_path_rate": 0.0, "method_kwargs.center_momentum": 0.5},
    )
    module = build(cfg)
    for head in (module.head, module.momentum_head):  # as after some training
        torch.nn.init.uniform_(head.last_layer.weight_v)
        if normalization != "l2":
            torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 3)
    center = torch.zeros(1, 32, dtype=torch.float64)
    tau_s, tau_t = 0.1, 0.07

    def logits(y: torch.Tensor, layer: Prototypes, tau: float) -> torch.Tensor:
        w = layer.weight_g.double() * F.normalize(layer.weight_v.double(), dim=-1)
        bias = log_normalizer(w.norm(dim=-1) / tau, 8) if normalization == "vmf" else 0.0
        return y.double() @ w.T / tau + bias

    for step in range(2):
        _, crops, _ = make_crops(seed=step)
        with torch.no_grad():
            out = module.distillation_loss(crops)
            student = [
                module.head(backbones.forward_tokens(module.backbone, x)[:, 0]) for x in crops
            ]
            teacher = [
                module.momentum_head(backbones.forward_tokens(module.momentum_backbone, x)[:, 0])
                for x in crops[:2]
            ]
            l_t = logits(torch.cat(teacher), module.momentum_head.last_layer, tau_t)
            # no normalizer: Eq. 8 centers the raw scores, i.e. before the temperature
            unit = tau_t if centering == "logit" and normalization != "vmf" else 1.0
            targets = (l_t - center / unit).softmax(-1)
            if centering == "logit":
                batch_center = unit * l_t.mean(0, keepdim=True)
            elif centering == "probability":
                batch_center = l_t.softmax(-1).mean(0, keepdim=True).log()
            else:
                batch_center = center
                for _ in range(3):
                    l_t = l_t - l_t.logsumexp(0, keepdim=True)
                    l_t = l_t - l_t.logsumexp(1, keepdim=True)
                targets = l_t.exp()
            targets = targets.chunk(2)
            terms = [
                -(targets[q] * logits(student[v], module.head.last_layer, tau_s).log_softmax(-1))
                .sum(-1)
                .mean()
                for q in range(2)
                for v in range(4)
                if v != q
            ]
            center = 0.5 * center + 0.5 * batch_center
        assert len(terms) == 6
        expected = float(torch.stack(terms).mean())
        assert out.loss.item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(module.centering.center.double(), center, rtol=1e-3, atol=1e-4)


# ---- multi-crop ----------------------------------------------------------------------------------


def test_forward_by_size__once_per_size_in_the_crops_order():
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return x.mean(dim=(1, 2, 3), keepdim=True).flatten(1)

    sizes = [8, 4, 8, 6, 4, 4]
    crops = [torch.full((3, 3, s, s), float(i)) for i, s in enumerate(sizes)]
    outputs = forward_by_size(forward, crops)
    assert calls == [(6, 3, 8, 8), (9, 3, 4, 4), (3, 3, 6, 6)]
    assert [o.unique().item() for o in outputs] == list(range(6))
    assert all(o.shape == (3, 1) for o in outputs)


def test_training_step__one_forward_per_size_one_of_each_head(tiny_cfg, crop_loader, build, fit):
    """Student: globals, then locals, then all in one head; teacher: the globals only."""
    module = build(tiny_cfg(**{"data.num_small_crops": 6, "max_epochs": 1}))
    calls: dict[str, list[tuple[int, ...]]] = {}
    parts = {
        "backbone": module.backbone.patch_embed.proj,
        "momentum_backbone": module.momentum_backbone.patch_embed.proj,
        "head": module.head,
        "momentum_head": module.momentum_head,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(
            lambda _, args, name=name: calls.setdefault(name, []).append(tuple(args[0].shape))
        )
    fit(module, crop_loader(1, small=6))
    assert calls == {
        "backbone": [(8, 3, 32, 32), (24, 3, 16, 16)],
        "momentum_backbone": [(8, 3, 32, 32)],
        "head": [(32, 128)],
        "momentum_head": [(8, 128)],
    }


@pytest.mark.parametrize(("large", "small"), [(2, 0), (2, 1), (2, 5), (3, 2)])
def test_every_crop_of_every_image__reaches_the_loss(tiny_cfg, make_crops, build, large, small):
    module = build(tiny_cfg(**{"data.num_large_crops": large, "data.num_small_crops": small}))
    _, crops, _ = make_crops(large=large, small=small)
    for crop in crops:
        crop.requires_grad_()
    module.distillation_loss(crops).loss.backward()
    for crop in crops:
        assert bool((crop.grad.flatten(1).abs().sum(dim=1) > 0).all())


def test_training_step__other_number_of_crops__named(tiny_cfg, crop_loader, build, fit):
    module = build(tiny_cfg())
    with pytest.raises(ValueError, match=r"gave 3 crops per image, but augmentations describe 4"):
        fit(module, crop_loader(1, small=1))


def test_backbone_without_tokens__trains_too(tiny_cfg, crop_loader, build, fit):
    module = build(tiny_cfg(max_epochs=1, **{"backbone.name": "resnet18", "backbone.kwargs": {}}))
    assert not backbones.is_vit(module.backbone)
    trainer = fit(module, crop_loader(2))
    assert trainer.global_step == 2
    assert bool(torch.isfinite(trainer.callback_metrics["train_loss"]))


# ---- teacher -------------------------------------------------------------------------------------


def _pairs(module):
    return [
        (module.backbone, module.momentum_backbone),
        (module.head, module.momentum_head),
    ]


def test_teacher__equals_the_student_at_the_start_on_its_own_storage(tiny_cfg, build):
    module = build(tiny_cfg())
    for student, teacher in _pairs(module):
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            assert torch.equal(parameter, theirs[name]), name
            assert parameter.data_ptr() != theirs[name].data_ptr(), name
    pointers = [p.data_ptr() for p in module.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_teacher__has_no_gradient_and_is_left_out_of_the_optimizer(
    tiny_cfg, crop_loader, build, fit
):
    module = build(tiny_cfg(max_epochs=1))
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer = fit(module, crop_loader(1))
    optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    for student, teacher in _pairs(module):
        assert all(id(p) in optimized for p in student.parameters() if p.requires_grad)
        for parameter in teacher.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert id(parameter) not in optimized
    # after one step the two differ: neither is a reference to the other
    after = dict(module.named_parameters())
    moved = [
        name
        for name in before
        if not torch.equal(before[name], after[name]) and "momentum" not in name
    ]
    assert any(name.startswith("backbone.blocks.1") for name in moved)
    assert not torch.equal(
        module.backbone.blocks[0].mlp.fc1.weight, module.momentum_backbone.blocks[0].mlp.fc1.weight
    )


def test_drop_path__student_only(tiny_cfg, make_crops, build):
    module = build(tiny_cfg(**{"backbone.kwargs.drop_path_rate": 0.5}), depth=None).train()
    _, crops, _ = make_crops(batch=8)
    with torch.no_grad():
        first, second = module.student_features(crops[0]), module.student_features(crops[0])
        assert not torch.equal(first, second)
        first, second = (module.momentum_forward(crops[0]) for _ in range(2))
    assert torch.equal(first["feats"], second["feats"])
    assert torch.equal(first["z"], second["z"])
    # a linear ramp over the blocks, as published
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in module.backbone.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, len(rates)), atol=1e-6)


def test_teacher_temperature__per_epoch(tiny_cfg, crop_loader, build, fit):
    cfg = tiny_cfg(
        max_epochs=5,
        **{
            "method_kwargs.warmup_teacher_temperature": 0.03,
            "method_kwargs.teacher_temperature": 0.06,
            "method_kwargs.warmup_teacher_temperature_epochs": 4,
        },
    )
    watch = Watch(lambda m: (m.last_step.teacher_temperature, m.last_step.targets))
    module = build(cfg)
    trainer = fit(module, crop_loader(2), callbacks=[watch])
    expected = np.repeat([0.03, 0.04, 0.05, 0.06, 0.06], 2)
    np.testing.assert_allclose([t for t, _ in watch.seen], expected)
    assert trainer.callback_metrics["teacher_temperature"].item() == pytest.approx(0.06)


def test_teacher_temperature__is_what_the_targets_use(tiny_cfg, make_crops, build):
    module = build(tiny_cfg("dino_multicrop", **{"method_kwargs.teacher_temperature": 0.02}))
    _, crops, _ = make_crops()
    module.distillation_loss(crops)
    record = module.last_step
    scores = module.momentum_head.last_layer.scores(record.teacher_embeddings)
    torch.testing.assert_close(record.targets, (scores / 0.02).softmax(-1))


# ---- labels --------------------------------------------------------------------------------------


def test_logged_loss__is_without_the_online_classifier(tiny_cfg, crop_loader, build, fit):
    """Users compare it with log K; solo-learn adds the classifier's cross-entropy to it."""
    module = build(tiny_cfg(max_epochs=1))
    watch = Watch(lambda m: m.last_step.loss)
    trainer = fit(module, crop_loader(1), callbacks=[watch])
    logged = trainer.callback_metrics
    assert logged["train_loss_step"].item() == watch.seen[0].item()
    assert logged["train_loss"].item() == watch.seen[0].item()
    assert logged["train_class_loss"].item() > 0.5


# ---- what others read ----------------------------------------------------------------------------


def test_prototype_spread__is_added_with_its_weight(tiny_cfg, make_crops, build):
    batch = make_crops()
    losses = []
    for weight in (0.0, 2.0):
        module = build(
            tiny_cfg(
                **{"method_kwargs.prototype_spread": weight, "backbone.kwargs.drop_path_rate": 0.0}
            )
        )
        module.log = module.log_dict = lambda *args, **kwargs: None
        losses.append(module.training_step(batch, 0))
    directions = F.normalize(module.head.last_layer.weight_v.detach(), dim=-1)
    distances = torch.cdist(directions, directions) + 10 * torch.eye(32)
    spread = -distances.min(dim=1).values.log().mean()
    assert (losses[1] - losses[0]).item() == pytest.approx(2 * spread.item(), rel=1e-3)


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["dino_vmf", "dino_multicrop"])
def test_half_precision__float32_where_it_matters(
    tiny_cfg, crop_loader, build, fit, method, precision
):
    module = build(tiny_cfg(method, max_epochs=1))
    watch = Watch(lambda m: m.last_step)
    trainer = fit(module, crop_loader(2), callbacks=[watch], precision=precision)
    for record in watch.seen:
        assert record.loss.dtype == torch.float32
        assert record.targets.dtype == torch.float32
        torch.testing.assert_close(record.targets.sum(-1), torch.ones(8))
    assert module.centering.center.dtype == torch.float32
    assert bool(module.centering.center.isfinite().all())
    assert module.centering.center.abs().sum() > 0
    assert bool(torch.isfinite(trainer.callback_metrics["train_loss"]))
    expected = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert module.head.last_layer.weight_v.dtype == expected
    assert module.head.last_layer.weight_g.dtype == torch.float32
