"""Stopping, resuming and what a checkpoint holds: nothing is lost, nothing is mixed up."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from dinovmf_plugin.methods.base import NonFiniteLossError
from dinovmf_plugin.training.folders import find_checkpoint, is_whole
from dinovmf_plugin.training.stored_config import ResumedOtherwiseWarning


class PowerLoss(Exception):
    """The machine went away."""


class Log(Callback):
    """Loss, temperature and the optimiser's groups of every step; dies at a given step."""

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


def _cfg(tiny_cfg: Any, folder: Path, method: str = "dino_vmf", **more: Any) -> Any:
    return tiny_cfg(
        method,
        **{
            "max_epochs": 4,
            "checkpoint.enabled": True,
            "checkpoint.dir": str(folder),
            "auto_resume.enabled": True,
            "scheduler.warmup_epochs": 1,
            "backbone.kwargs.drop_path_rate": 0.3,
            "method_kwargs.final_weight_decay": 0.4,
            "method_kwargs.freeze_last_layer": 1,
            "method_kwargs.warmup_teacher_temperature_epochs": 4,
            "method_kwargs.clip_grad": 0.3,
            **more,
        },
    )


def _everything(trainer: Any, module: Any) -> dict[str, Any]:
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "step": trainer.global_step,
    }


def _assert_identical(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            _assert_identical(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_identical(x, y, f"{path}/{i}")
    else:
        assert a == b, path


EM = {
    "method_kwargs.prototype_update": "em",
    "method_kwargs.em_memory": 5.0,
    "method_kwargs.init_prototypes": "em",
    "method_kwargs.num_prototypes": 8,
}


DINOV2 = {
    "method_kwargs.patch_head": "separate",
    "method_kwargs.num_patch_prototypes": 24,
    "method_kwargs.patch_center_tokens": "masked",
    "method_kwargs.koleo_weight": 0.1,
    "method_kwargs.layer_decay": 0.9,
    "method_kwargs.patch_embed_lr_mult": 0.2,
    "method_kwargs.lr_scaling": "sqrt",
    "method_kwargs.clip_by": "network",
    "method_kwargs.freeze_by": "rate",
    "backbone.kwargs.patch_size": 8,
}


@pytest.mark.parametrize(
    ("method", "accumulate", "more"),
    [
        ("ibot_vmf", 1, DINOV2),
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
    """Weights, centre, optimiser, EMA, schedules and drop path: bit for bit, after a crash."""
    steps = 2 * accumulate
    kwargs = {"accumulate_grad_batches": accumulate}
    whole, whole_log = build(_cfg(tiny_cfg, tmp_path / "whole", method, **more)), Log()
    expected = _everything(fit(whole, crop_loader(steps), callbacks=[whole_log], **kwargs), whole)
    assert expected["step"] == 8

    # dies in the middle of the third epoch: what it did there is lost, and done again
    first, first_log = build(_cfg(tiny_cfg, tmp_path / "parts", method, **more)), Log(die_at=5)
    with pytest.raises(PowerLoss):
        fit(first, crop_loader(steps), callbacks=[first_log], **kwargs)
    second, second_log = build(_cfg(tiny_cfg, tmp_path / "parts", method, **more), seed=123), Log()
    checkpoint = find_checkpoint(second.cfg)
    assert checkpoint.name == "tiny-ep1.ckpt"
    trainer = fit(
        second, crop_loader(steps), callbacks=[second_log], ckpt_path=checkpoint, **kwargs
    )
    _assert_identical(_everything(trainer, second), expected)
    done = [step for step in first_log.steps if step[2 + 1] < 2] + second_log.steps
    _assert_identical(done, whole_log.steps)
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

    cfg = _cfg(tiny_cfg, tmp_path, **{"momentum.base_tau": 0.9})
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

    first = build(_cfg(tiny_cfg, tmp_path))
    fit(first, crop_loader(2), callbacks=[Stop()])
    changes = {
        "optimizer.lr": 0.5,
        "optimizer.weight_decay": 0.3,
        "optimizer.kwargs.betas": [0.5, 0.6],
    }
    changes |= {"method_kwargs.final_weight_decay": None, "scheduler.name": "none"}
    second, log = build(_cfg(tiny_cfg, tmp_path / "other", **changes)), Log()
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


# ---- what a checkpoint holds ---------------------------------------------------------------------


@pytest.fixture
def trained(tiny_cfg, crop_loader, build, fit, tmp_path) -> tuple[Any, Path]:
    module = build(_cfg(tiny_cfg, tmp_path, max_epochs=1))
    fit(module, crop_loader(2))
    return module, find_checkpoint(module.cfg)


def test_checkpoint__is_plain_data_with_the_documented_keys(trained, build):
    module, path = trained
    checkpoint = torch.load(path, weights_only=True)  # no pickled code
    state = checkpoint["state_dict"]
    for name in (
        "backbone.cls_token",
        "momentum_backbone.cls_token",
        "head.mlp.0.weight",
        "momentum_head.mlp.4.bias",
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
        "momentum_head.last_layer.weight_g",
        "centering.center",
    ):
        assert name in state, name
    assert state["centering.center"].abs().sum() > 0
    # neither generation's other names
    assert not any(name.startswith(("encoder", "momentum_encoder")) for name in state)

    # the config in it is enough to build the same network again
    cfg = checkpoint["dinovmf_plugin"]["cfg"]
    assert type(cfg) is dict
    assert cfg["method"] == "dino_vmf"
    assert cfg["backbone"]["kwargs"]["patch_size"] == 16
    assert cfg["method_kwargs"]["normalization"] == "vmf"
    again = build(OmegaConf.create(cfg), seed=7)
    again.load_state_dict(state)
    _assert_identical(dict(again.state_dict()), dict(module.state_dict()))


def test_on_load_checkpoint__what_does_not_fit__named_before_any_weight_moves(
    trained, tiny_cfg, crop_loader, build, fit, tmp_path
):
    _, path = trained
    for key, value, other in (
        ("method_kwargs.num_prototypes", 48, "32"),
        ("method_kwargs.proj_output_dim", 16, "8"),
        ("method_kwargs.proj_hidden_dim", 16, "24"),
        ("method_kwargs.normalization", "none", "vmf"),
        ("method_kwargs.centering", "logit", "probability"),
        ("method", "dino_multicrop", "dino_vmf"),
    ):
        cfg = _cfg(tiny_cfg, tmp_path / "other")
        OmegaConf.update(cfg, key, value)
        if key == "method":  # everything else the same
            cfg.method_kwargs.normalization, cfg.method_kwargs.centering = "vmf", "probability"
        module = build(cfg, seed=5)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError) as caught:
            fit(module, crop_loader(1), ckpt_path=path)
        message = str(caught.value)
        assert f"{key}={value!r} differs from the checkpoint's" in message
        assert other in message
        assert "init_from" in message
        _assert_identical(dict(module.state_dict()), dict(before))


# ---- ends of runs --------------------------------------------------------------------------------


def _files(cfg: Any) -> list[str]:
    root = Path(cfg.checkpoint.dir)
    return sorted(str(p.relative_to(root)).split("/", 2)[-1] for p in root.glob("**/*.ckpt"))


def test_last_epoch__saved_though_the_frequency_would_skip_it(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    cfg = _cfg(tiny_cfg, tmp_path, max_epochs=5, **{"checkpoint.frequency": 3})
    fit(build(cfg), crop_loader(1))
    assert _files(cfg) == ["previous/tiny-ep2.ckpt", "tiny-ep4.ckpt"]


def test_early_stop__its_epoch_is_saved(tiny_cfg, crop_loader, build, fit, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    cfg = _cfg(tiny_cfg, tmp_path, max_epochs=9, **{"checkpoint.frequency": 5})
    fit(build(cfg), crop_loader(1), callbacks=[Stop()])
    assert _files(cfg) == ["tiny-ep1.ckpt"]


def test_ablation_cells__never_resume_from_each_other(tiny_cfg, crop_loader, build, fit, tmp_path):
    module = build(_cfg(tiny_cfg, tmp_path, max_epochs=1))
    fit(module, crop_loader(1))
    assert find_checkpoint(module.cfg) is not None
    for key, value in (
        ("method_kwargs.normalization", "l2"),
        ("method_kwargs.centering", "logit"),
        ("method_kwargs.center_momentum", 0.95),
        ("seed", 42),
        ("optimizer.lr", 2e-3),
        ("data.num_small_crops", 3),
        ("max_epochs", 2),
        ("name", "other"),
    ):
        cfg = _cfg(tiny_cfg, tmp_path, **{"max_epochs": 1, key: value})
        assert find_checkpoint(build(cfg).cfg) is None, key


def test_truncated_newest_checkpoint__falls_back_to_the_one_before(
    tiny_cfg, crop_loader, build, fit, tmp_path, capsys
):
    module = build(_cfg(tiny_cfg, tmp_path, max_epochs=2))
    fit(module, crop_loader(2))
    newest = find_checkpoint(module.cfg)
    assert newest.name == "tiny-ep1.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    capsys.readouterr()
    before = find_checkpoint(module.cfg)
    assert before.name == "tiny-ep0.ckpt"
    assert f"{newest} is truncated" in capsys.readouterr().out
    # and training goes on from there to the same end
    resumed = build(_cfg(tiny_cfg, tmp_path, max_epochs=2))
    fit(resumed, crop_loader(2), ckpt_path=before)
    _assert_identical(dict(resumed.state_dict()), dict(module.state_dict()))
    assert is_whole(find_checkpoint(resumed.cfg))
    assert _files(module.cfg) == ["previous/tiny-ep0.ckpt", "tiny-ep1.ckpt"]


# ---- non-finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss__stops_names_the_step_keeps_the_checkpoint(
    tiny_cfg, crop_loader, build, fit, tmp_path, value
):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                batch[1][0][0, 0, 0, 0] = value

    module = build(_cfg(tiny_cfg, tmp_path))
    with pytest.raises(
        NonFiniteLossError, match=r"became (nan|inf) at step 3 \(epoch 1\)"
    ) as caught:
        fit(module, crop_loader(2), callbacks=[Poison()])
    assert "optimizer.lr" in str(caught.value)
    checkpoint = find_checkpoint(module.cfg)
    assert checkpoint.name == "tiny-ep0.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(bool(v.isfinite().all()) for v in state.values())


def test_non_finite_weights__never_replace_a_good_checkpoint(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    """A finite loss may have a NaN gradient; if that is an epoch's last step, no loss follows it."""

    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            if trainer.global_step == 3:
                module.head.mlp[0].weight.grad[0, 0] = float("nan")

    module = build(_cfg(tiny_cfg, tmp_path))
    with pytest.raises(NonFiniteLossError, match=r"head\.mlp\.0\.weight .*step 4 \(epoch 1\)"):
        fit(module, crop_loader(2), callbacks=[Poison()])
    assert find_checkpoint(module.cfg).name == "tiny-ep0.ckpt"
    assert _files(module.cfg) == ["tiny-ep0.ckpt"]
