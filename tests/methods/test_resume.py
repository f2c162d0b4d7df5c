"""Stopping and resuming: nothing is lost, nothing is mixed up."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from dinovmf_plugin.training.folders import find_checkpoint
from dinovmf_plugin.training.stored_config import ResumedOtherwiseWarning
from tests.methods.dinov2 import DINOV2
from tests.methods.saved_runs import assert_identical, saving_cfg


class PowerLoss(Exception):
    """The machine went away."""


class Log(Callback):
    """Loss, temperature and the optimizer's groups of every step; dies at a given step."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.steps = die_at, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        groups = [
            {k: v for k, v in group.items() if k in ("name", "lr", "weight_decay")}
            for group in trainer.optimizers[0].param_groups
        ]
        record = module.last_step
        values = (record.loss.item(), record.teacher_temperature, trainer.current_epoch)
        self.steps.append((trainer.global_step, *values, groups))
        if trainer.global_step == self.die_at:
            raise PowerLoss


def _everything(trainer: Any, module: Any) -> dict[str, Any]:
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "step": trainer.global_step,
    }


EM = {
    "method_kwargs.prototype_update": "em",
    "method_kwargs.em_memory": 5.0,
    "method_kwargs.init_prototypes": "em",
    "method_kwargs.num_prototypes": 8,
}


@pytest.mark.parametrize(
    ("method", "accumulate", "more"),
    [
        ("ibot_vmf", 1, DINOV2 | {"backbone.kwargs.patch_size": 8}),
        ("dino_vmf", 1, {}),
        ("dino_multicrop", 1, {}),
        ("dino_vmf", 2, {}),
        ("dino_vmf", 2, EM),
        ("ibot_vmf", 1, EM),
    ],
)
def test_four_epochs__equal_two_plus_two(
    tiny_cfg, crop_loader, build, fit, tmp_path, method, accumulate, more
):
    """Weights, center, optimizer, EMA, schedules and drop path: bit for bit, after a crash."""
    steps = 2 * accumulate
    kwargs = {"accumulate_grad_batches": accumulate}
    whole, whole_log = build(saving_cfg(tiny_cfg, tmp_path / "whole", method, **more)), Log()
    expected = _everything(fit(whole, crop_loader(steps), callbacks=[whole_log], **kwargs), whole)
    assert expected["step"] == 8

    # dies in the middle of the third epoch: what it did there is lost, and done again
    first, first_log = (
        build(saving_cfg(tiny_cfg, tmp_path / "parts", method, **more)),
        Log(die_at=5),
    )
    with pytest.raises(PowerLoss):
        fit(first, crop_loader(steps), callbacks=[first_log], **kwargs)
    second, second_log = (
        build(saving_cfg(tiny_cfg, tmp_path / "parts", method, **more), seed=123),
        Log(),
    )
    checkpoint = find_checkpoint(second.cfg)
    assert checkpoint.name == "tiny-ep1.ckpt"
    trainer = fit(
        second, crop_loader(steps), callbacks=[second_log], ckpt_path=checkpoint, **kwargs
    )
    assert_identical(_everything(trainer, second), expected)
    done = [step for step in first_log.steps if step[2 + 1] < 2] + second_log.steps
    assert_identical(done, whole_log.steps)
    assert whole.centering.center.abs().max() > 0.01
    temperatures = [step[2] for step in done[:: len(done) // 4]]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07])


def test_other_seed__other_drop_path(tiny_cfg, crop_loader, build, fit, tmp_path):
    """Guards the test above: the drop path is random, and depends on the run's seed and epoch."""
    losses = []
    for seed in (0, 0, 1):
        log = Log()
        cfg = tiny_cfg(max_epochs=2, seed=seed, **{"backbone.kwargs.drop_path_rate": 0.5})
        cfg.optimizer.lr = 0.0
        cfg.optimizer.classifier_lr = 0.0
        cfg.method_kwargs.center_momentum = 0.999999
        fit(build(cfg), crop_loader(1, batch=8), callbacks=[log])
        losses.append([step[1] for step in log.steps])
    assert losses[0] == losses[1]
    assert abs(losses[0][0] - losses[2][0]) > 1e-3
    assert abs(losses[0][0] - losses[0][1]) > 1e-3


# ---- other values than the checkpoint's ------------------------------------------------------------


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("batches", "accumulate", "steps"), [(2, 1, 2), (4, 1, 4), (6, 1, 6), (4, 2, 2), (3, 2, 2)]
)
def test_resumed_with_other_steps_in_an_epoch__schedules_go_on_by_epochs(
    tiny_cfg, crop_loader, build, fit, tmp_path, batches, accumulate, steps
):
    """Learning rate, weight decay and EMA of epoch 3 of 4, whatever the batch size was before."""

    class Momenta(Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            self.seen.append(module.teacher_momentum(trainer.global_step - 1))

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    cfg = saving_cfg(tiny_cfg, tmp_path, **{"momentum.base_tau": 0.9})
    fit(build(copy.deepcopy(cfg)), crop_loader(2), callbacks=[Stop()])
    module, log, momenta = build(copy.deepcopy(cfg)), Log(), Momenta()
    fit(
        module,
        crop_loader(batches),
        callbacks=[log, momenta],
        ckpt_path=find_checkpoint(module.cfg),
        accumulate_grad_batches=accumulate,
    )
    assert len(log.steps) == 2 * batches
    peak, total = module.optimizers(use_pl_optimizer=False).param_groups[0]["peak_lr"], 4 * steps
    for number, (record, momentum) in enumerate(zip(log.steps, momenta.seen, strict=True)):
        epoch, batch = 2 + number // batches, number % batches
        done = epoch * steps + batch // accumulate  # as of a run that always had these steps
        group = record[-1][0]
        rate = _cosine(peak, module.min_lr, (done - steps) / (total - steps))
        assert group["lr"] == pytest.approx(rate, rel=1e-9), number
        decay = _cosine(module.weight_decay, 0.4, done / total)
        assert group["weight_decay"] == pytest.approx(decay, rel=1e-9), number
        if (batch + 1) % accumulate == 0 or batch + 1 == batches:  # the teacher moves
            assert momentum == pytest.approx(_cosine(0.9, 1.0, done / total), rel=1e-9), number


def test_resumed_with_other_rates__they_count_and_are_told(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first = build(saving_cfg(tiny_cfg, tmp_path))
    fit(first, crop_loader(2), callbacks=[Stop()])
    changes = {
        "optimizer.lr": 0.5,
        "optimizer.weight_decay": 0.3,
        "optimizer.kwargs.betas": [0.5, 0.6],
    }
    changes |= {"method_kwargs.final_weight_decay": None, "scheduler.name": "none"}
    second, log = build(saving_cfg(tiny_cfg, tmp_path / "other", **changes)), Log()
    with pytest.warns(ResumedOtherwiseWarning) as told:
        trainer = fit(second, crop_loader(2), callbacks=[log], ckpt_path=find_checkpoint(first.cfg))
    (sentence,) = [str(w.message) for w in told if w.category is ResumedOtherwiseWarning]
    assert "optimizer.lr=0.5 (was " in sentence
    assert "optimizer.weight_decay=0.3 (was " in sentence
    assert all(step[-1][0]["lr"] == 0.5 for step in log.steps)
    assert all(step[-1][0]["weight_decay"] == 0.3 for step in log.steps)
    (state,) = trainer.optimizers[0].param_groups[:1]
    assert tuple(state["betas"]) == (0.5, 0.6)
    written = torch.load(find_checkpoint(second.cfg), weights_only=True)
    assert written["dinovmf_plugin"]["cfg"]["optimizer"]["lr"] == 0.5
    assert written["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    assert written["global_step"] == 8
