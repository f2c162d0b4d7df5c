"""What happens around an optimizer step: groups, schedules per step, clipping, freezing, EMA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from dinovmf_plugin.training import optimization

EPOCHS, STEPS = 4, 3


class Steps(Callback):
    """What there was before every optimizer step, and right after it (before the teacher moves)."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.global_steps: list[int] = []

    @staticmethod
    def state(module: Any) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        state = self.state(module)
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in trainer.optimizers[0].param_groups
        ]
        self.before.append({"state": state, "previous_groups": groups})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        # callbacks come before the module's own hook, which moves the teacher
        self.after.append(self.state(module))
        self.global_steps.append(trainer.global_step)
        self.before[-1]["groups"] = [
            {k: v for k, v in group.items() if k != "params"}
            for group in trainer.optimizers[0].param_groups
        ]


def _cosine(start: float, end: float, total: int) -> np.ndarray:
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(total) / total))


def _warmup_cosine(peak: float, end: float, total: int, warmup: int, start: float) -> np.ndarray:
    rest = _cosine(peak, end, total - warmup)
    return np.concatenate([np.linspace(start, peak, warmup), rest])


def _student(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v for n, v in state.items() if n.startswith(("backbone.", "head."))}


# ---- groups --------------------------------------------------------------------------------------


# ---- schedules -----------------------------------------------------------------------------------


def _schedule_cfg(tiny_cfg: Any, **more: Any) -> Any:
    return tiny_cfg(
        **{
            "max_epochs": EPOCHS,
            "optimizer.lr": 2e-3,
            "optimizer.classifier_lr": 0.1,
            "scheduler.warmup_epochs": 1,
            "scheduler.min_lr": 1e-5,
            "scheduler.warmup_start_lr": 1e-7,
            "optimizer.weight_decay": 0.04,
            "method_kwargs.final_weight_decay": 0.4,
            **more,
        },
    )


def test_schedules__per_step__equal_the_official_tables(tiny_cfg, crop_loader, build, fit):
    total = EPOCHS * STEPS
    watch = Steps()
    fit(build(_schedule_cfg(tiny_cfg)), crop_loader(STEPS), callbacks=[watch])
    assert len(watch.before) == total
    lr = _warmup_cosine(2e-3, 1e-5, total, STEPS, 1e-7)
    classifier_lr = _warmup_cosine(0.1, 1e-5, total, STEPS, 1e-7)
    decay = _cosine(0.04, 0.4, total)
    for step, record in enumerate(watch.before):
        for group in record["groups"]:
            expected = classifier_lr if group["name"].startswith("classifier") else lr
            assert group["lr"] == pytest.approx(expected[step], rel=1e-9), (step, group["name"])
            wd = decay[step] if group["decay"] else 0.0
            assert group["weight_decay"] == pytest.approx(wd, rel=1e-9), (step, group["name"])


def test_schedules__gradient_accumulation__counts_optimizer_steps(
    tiny_cfg, crop_loader, build, fit
):
    cfg = _schedule_cfg(tiny_cfg, max_epochs=2, **{"method_kwargs.final_weight_decay": 0.4})
    watch = Steps()
    trainer = fit(
        build(cfg), crop_loader(4), callbacks=[watch], accumulate_grad_batches=2, max_epochs=2
    )
    assert trainer.global_step == 4
    decay, lr = _cosine(0.04, 0.4, 4), _warmup_cosine(2e-3, 1e-5, 4, 2, 1e-7)
    for i, record in enumerate(watch.before):
        group = record["groups"][0]
        assert group["weight_decay"] == pytest.approx(decay[i // 2], rel=1e-9)
        assert group["lr"] == pytest.approx(lr[i // 2], rel=1e-9)


def test_schedules__constant_weight_decay_by_default(tiny_cfg, crop_loader, build, fit):
    cfg = _schedule_cfg(tiny_cfg, **{"method_kwargs.final_weight_decay": None, "max_epochs": 2})
    watch = Steps()
    fit(build(cfg), crop_loader(2), callbacks=[watch])
    for record in watch.before:
        assert {g["weight_decay"] for g in record["groups"] if g["decay"]} == {0.04}
        assert {g["weight_decay"] for g in record["groups"] if not g["decay"]} == {0.0}


def test_schedules__scheduler_none__constant_lr_but_no_decay_on_vectors(
    tiny_cfg, crop_loader, build, fit
):
    cfg = _schedule_cfg(tiny_cfg, **{"scheduler.name": "none", "max_epochs": 2})
    watch = Steps()
    fit(build(cfg), crop_loader(2), callbacks=[watch])
    decay = _cosine(0.04, 0.4, 4)
    for step, record in enumerate(watch.before):
        for group in record["groups"]:
            peak = 0.1 if group["name"].startswith("classifier") else 2e-3
            assert group["lr"] == peak
            wd = decay[step] if group["decay"] else 0.0
            assert group["weight_decay"] == pytest.approx(wd, rel=1e-9), (step, group["name"])


def test_first_step_at_learning_rate_zero__moves_nothing(tiny_cfg, crop_loader, build, fit):
    """The values must be in force *in* their step, not one later."""
    cfg = _schedule_cfg(tiny_cfg, max_epochs=2, **{"scheduler.warmup_start_lr": 0.0})
    watch = Steps()
    fit(build(cfg), crop_loader(2), callbacks=[watch])
    for name, value in _student(watch.after[0]).items():
        assert torch.equal(value, watch.before[0]["state"][name]), name
    assert any(
        not torch.equal(value, watch.after[0][name])
        for name, value in _student(watch.after[1]).items()
    )


# ---- EMA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher__follows_the_student_after_every_optimizer_step(
    tiny_cfg, crop_loader, build, fit, accumulate
):
    cfg = tiny_cfg(max_epochs=2, **{"momentum.base_tau": 0.6, "momentum.final_tau": 0.95})
    module = build(cfg)
    watch = Steps()
    trainer = fit(module, crop_loader(4), callbacks=[watch], accumulate_grad_batches=accumulate)
    total = 8 // accumulate
    assert trainer.global_step == total
    momentum = _cosine(0.6, 0.95, total)
    states = [record["state"] for record in watch.before[1:]] + [Steps.state(module)]
    students = [name for name, p in module.named_parameters() if not name.startswith("momentum_")]
    pairs = {name: f"momentum_{name}" for name in students if not name.startswith("classifier")}
    assert len(pairs) == sum(name.startswith("momentum_") for name, _ in module.named_parameters())
    for i, (after, now) in enumerate(zip(watch.after, states, strict=True)):
        stepped = (i + 1) % accumulate == 0
        m = momentum[watch.global_steps[i] - 1]
        for student, teacher in pairs.items():
            before = watch.before[i]["state"][teacher]
            assert torch.equal(after[teacher], before)
            if stepped:  # with the student *after* this step
                expected = m * before + (1 - m) * after[student]
                torch.testing.assert_close(now[teacher], expected, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(now[teacher], before), (i, teacher)
    assert trainer.callback_metrics["tau"].item() == pytest.approx(momentum[-1])


def test_update_teacher__in_place_parameters_only_by_name():
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.randn(3))  # the student alone has one
            self.second, self.first = nn.Linear(2, 3), nn.BatchNorm1d(3)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(3), nn.Linear(2, 3)

    student, teacher = Student(), Teacher()
    student.first.running_mean.fill_(7.0)
    expected = {
        name: 0.9 * p.detach() + 0.1 * dict(student.named_parameters())[name].detach()
        for name, p in teacher.named_parameters()
    }
    pointers = [p.data_ptr() for p in teacher.parameters()]
    optimization.update_teacher([(student, teacher)], 0.9)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
    assert [p.data_ptr() for p in teacher.parameters()] == pointers
    assert torch.equal(teacher.first.running_mean, torch.zeros(3))


# ---- clipping ------------------------------------------------------------------------------------


def test_clip_per_parameter__each_tensor_by_its_own_norm():
    torch.manual_seed(0)
    scales = [0.01, 1.0, 50.0, 0.0]
    parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in [*scales, None]]
    for parameter, scale in zip(parameters, scales, strict=False):
        parameter.grad = torch.randn(4, 3) * scale
    expected = [p.grad * min(1.0, 0.3 / (p.grad.norm().item() + 1e-6)) for p in parameters[:-1]]
    optimization.clip_per_parameter(parameters, 0.3)
    for parameter, gradient in zip(parameters, expected, strict=False):
        torch.testing.assert_close(parameter.grad, gradient)
    assert parameters[-1].grad is None
    before = parameters[2].grad.clone() * 100
    parameters[2].grad = before.clone()
    optimization.clip_per_parameter(parameters, 0.0)
    assert torch.equal(parameters[2].grad, before)
    optimization.clip_per_parameter(parameters[-1:], 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_together__equals_one_multiplication_per_tensor(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (), (7,), (2, 3, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[-1] = tensors[-1].to(memory_format=torch.channels_last)
    factors = torch.rand(len(shapes), generator=generator).to(dtype)
    expected = [t * f for t, f in zip(tensors, factors, strict=True)]
    optimization.scale_together(tensors, factors)
    for tensor, value in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.stride() == value.stride()


def test_clip_per_parameter__gradients_of_two_dtypes():
    parameters = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimization.clip_per_parameter(parameters, 1.0)
    for parameter in parameters:
        assert float(parameter.grad.norm()) == pytest.approx(1, rel=1e-2)


# ---- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_make_optimizer__fused__same_steps_as_the_plain_loop(cls):
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    updated = []
    for more in ({}, {"fused": False}, {"foreach": True}):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (2, 50)]
        optimizer = optimization.make_optimizer(cls, [{"params": parameters}], **options, **more)
        assert bool(optimizer.param_groups[0]["fused"]) is (not more)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        updated.append(torch.cat([p.detach() for p in parameters]))
    for other in updated[1:]:
        torch.testing.assert_close(updated[0], other, rtol=1e-5, atol=1e-6)


def test_make_optimizer__others_have_no_fused_default():
    parameters = [nn.Parameter(torch.zeros(3))]
    optimizer = optimization.make_optimizer(
        torch.optim.SGD, [{"params": parameters}], lr=0.1, weight_decay=0.0, momentum=0.9
    )
    assert not optimizer.param_groups[0]["fused"]


class Gradients(Callback):
    """Gradient norms as the optimizer saw them: they stay until the next step's ``zero_grad``."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        norms = {n: p.grad.norm().item() for n, p in named.items() if p.grad is not None}
        self.norms.append(norms)


class _ScaledFloat32(MixedPrecision):
    """Lightning's AMP with its loss scaling, but float32 arithmetic: scaling by 2^16 is exact."""

    def __init__(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        super().__init__("16-mixed", "cpu", scaler=scaler)

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def test_clipping__under_amp__of_unscaled_gradients_of_backbone_and_head(
    tiny_cfg, crop_loader, build, fit
):
    """Had the scaled gradients been clipped, everything would be clipped and then divided by 65536."""
    free = Gradients()
    fit(build(tiny_cfg(max_epochs=1)), crop_loader(1), callbacks=[free])
    parts = ("backbone.", "head.")
    norms = [[n for name, n in free.norms[0].items() if name.startswith(p)] for p in parts]
    # some gradients of either part are longer than this, and some are shorter
    clip = (max(map(min, norms)) * min(map(max, norms))) ** 0.5
    assert all(min(part) < clip < max(part) for part in norms)

    states, clipped = [], []
    for plugins in (None, [_ScaledFloat32()]):
        watch, gradients = Steps(), Gradients()
        module = build(tiny_cfg(max_epochs=1, **{"method_kwargs.clip_grad": clip}))
        fit(module, crop_loader(2), callbacks=[watch, gradients], plugins=plugins)
        states.append(watch.after[-1])
        clipped.append(gradients.norms[0])
    for name, norm in free.norms[0].items():
        expected = norm if name.startswith("classifier") else min(norm, clip * norm / (norm + 1e-6))
        assert clipped[0][name] == pytest.approx(expected, rel=1e-4, abs=1e-9), name
    assert clipped[1] == clipped[0]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_clipping__after_gradient_accumulation(tiny_cfg, crop_loader, build, fit):
    cfg = tiny_cfg(max_epochs=1, **{"method_kwargs.clip_grad": 1e-3})
    gradients = Gradients()
    fit(build(cfg), crop_loader(4), callbacks=[gradients], accumulate_grad_batches=4)
    norms = [n for name, n in gradients.norms[-1].items() if name.startswith("head.mlp")]
    assert max(norms) == pytest.approx(1e-3, rel=2e-3)


# ---- freezing ------------------------------------------------------------------------------------


def test_last_layer__frozen_for_the_first_epochs_then_moves(tiny_cfg, crop_loader, build, fit):
    cfg = tiny_cfg(max_epochs=3, **{"method_kwargs.freeze_last_layer": 2})
    watch, gradients = Steps(), Gradients()
    fit(build(cfg), crop_loader(2), callbacks=[watch, gradients])
    first = watch.before[0]["state"]
    for i, after in enumerate(watch.after):
        for name in ("head.last_layer.weight_v", "head.last_layer.weight_g"):
            frozen = i < 4  # two epochs of two steps
            # not even weight decay moves it: the optimizer sees no gradient at all
            assert torch.equal(after[name], first[name]) is frozen, (i, name)
            assert (name in gradients.norms[i]) is not frozen
        assert not torch.equal(after["head.mlp.0.weight"], first["head.mlp.0.weight"])


def test_l2__magnitudes_stay_one_and_vmf_moves_them(tiny_cfg, crop_loader, build, fit):
    for normalization, moves in (("l2", False), ("none", True), ("vmf", True)):
        module = build(tiny_cfg(max_epochs=1, **{"method_kwargs.normalization": normalization}))
        fit(module, crop_loader(2))
        for head in (module.head, module.momentum_head):
            still = torch.equal(head.last_layer.weight_g, torch.ones(32, 1))
            assert still is not moves, normalization
