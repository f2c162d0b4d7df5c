"""What a checkpoint holds, and that every run ends with a good one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from dinovmf_plugin.methods.base import NonFiniteLossError
from dinovmf_plugin.training.folders import find_checkpoint, is_whole
from tests.methods.saved_runs import assert_identical, saving_cfg


@pytest.fixture
def trained(tiny_cfg, crop_loader, build, fit, tmp_path) -> tuple[Any, Path]:
    module = build(saving_cfg(tiny_cfg, tmp_path, max_epochs=1))
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
    assert_identical(dict(again.state_dict()), dict(module.state_dict()))


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
        cfg = saving_cfg(tiny_cfg, tmp_path / "other")
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
        assert_identical(dict(module.state_dict()), dict(before))


# ---- ends of runs --------------------------------------------------------------------------------


def _files(cfg: Any) -> list[str]:
    root = Path(cfg.checkpoint.dir)
    return sorted(str(p.relative_to(root)).split("/", 2)[-1] for p in root.glob("**/*.ckpt"))


def test_last_epoch__saved_though_the_frequency_would_skip_it(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    cfg = saving_cfg(tiny_cfg, tmp_path, max_epochs=5, **{"checkpoint.frequency": 3})
    fit(build(cfg), crop_loader(1))
    assert _files(cfg) == ["previous/tiny-ep2.ckpt", "tiny-ep4.ckpt"]


def test_early_stop__its_epoch_is_saved(tiny_cfg, crop_loader, build, fit, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    cfg = saving_cfg(tiny_cfg, tmp_path, max_epochs=9, **{"checkpoint.frequency": 5})
    fit(build(cfg), crop_loader(1), callbacks=[Stop()])
    assert _files(cfg) == ["tiny-ep1.ckpt"]


def test_ablation_cells__never_resume_from_each_other(tiny_cfg, crop_loader, build, fit, tmp_path):
    module = build(saving_cfg(tiny_cfg, tmp_path, max_epochs=1))
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
        cfg = saving_cfg(tiny_cfg, tmp_path, **{"max_epochs": 1, key: value})
        assert find_checkpoint(build(cfg).cfg) is None, key


def test_truncated_newest_checkpoint__falls_back_to_the_one_before(
    tiny_cfg, crop_loader, build, fit, tmp_path, capsys
):
    module = build(saving_cfg(tiny_cfg, tmp_path, max_epochs=2))
    fit(module, crop_loader(2))
    newest = find_checkpoint(module.cfg)
    assert newest.name == "tiny-ep1.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    capsys.readouterr()
    before = find_checkpoint(module.cfg)
    assert before.name == "tiny-ep0.ckpt"
    assert f"{newest} is truncated" in capsys.readouterr().out
    # and training goes on from there to the same end
    resumed = build(saving_cfg(tiny_cfg, tmp_path, max_epochs=2))
    fit(resumed, crop_loader(2), ckpt_path=before)
    assert_identical(dict(resumed.state_dict()), dict(module.state_dict()))
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

    module = build(saving_cfg(tiny_cfg, tmp_path))
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

    module = build(saving_cfg(tiny_cfg, tmp_path))
    with pytest.raises(NonFiniteLossError, match=r"head\.mlp\.0\.weight .*step 4 \(epoch 1\)"):
        fit(module, crop_loader(2), callbacks=[Poison()])
    assert find_checkpoint(module.cfg).name == "tiny-ep0.ckpt"
    assert _files(module.cfg) == ["tiny-ep0.ckpt"]
