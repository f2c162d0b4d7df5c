"""The callbacks a method brings along, whoever builds the Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from dinovmf_plugin.training.checkpointer import Checkpointer
from dinovmf_plugin.training.crops import CropCheck
from dinovmf_plugin.training.loggers import RunIds
from dinovmf_plugin.training.monitor import MixtureMonitor
from dinovmf_plugin.training.peers import PeerWatch


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("monitor", [True, False])
def test_configure_callbacks__what_the_config_asks_for(
    tiny_cfg, build, tmp_path, checkpoint, monitor
):
    cfg = tiny_cfg(
        **{
            "checkpoint.enabled": checkpoint,
            "checkpoint.dir": str(tmp_path),
            "checkpoint.frequency": 3,
            "method_kwargs.monitor": monitor,
            "method_kwargs.monitor_every": 7,
            "method_kwargs.stop_on_collapse": True,
        }
    )
    callbacks = build(cfg).configure_callbacks()
    kinds = [type(callback) for callback in callbacks]
    # the checkpointer first: it tells the monitor where the run's folder is
    brought = [Checkpointer, RunIds] * checkpoint + [CropCheck, MixtureMonitor] * monitor
    assert kinds == [*brought, PeerWatch]
    if checkpoint:
        assert callbacks[0].frequency == 3
    if monitor:
        assert callbacks[-2].every_n_steps == 7
        assert callbacks[-2].stops["uniform_collapse"] is True
        assert (callbacks[-2].history_path is not None) is checkpoint


def test_monitor__writes_beside_the_checkpoint_and_changes_nothing(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    states = []
    for monitor in (True, False):
        cfg = tiny_cfg(
            **{
                "checkpoint.enabled": True,
                "checkpoint.dir": str(tmp_path / str(monitor)),
                "method_kwargs.monitor": monitor,
                "method_kwargs.monitor_every": 2,
                "backbone.kwargs.drop_path_rate": 0.3,
            }
        )
        module = build(cfg)
        trainer = fit(module, crop_loader(3))
        states.append(module.state_dict())
        (checkpointer,) = [c for c in trainer.callbacks if isinstance(c, Checkpointer)]
        history = Path(checkpointer.path) / "monitor.jsonl"
        assert history.exists() is monitor
        if monitor:
            records = [json.loads(line) for line in history.read_text().splitlines()]
            assert [r["step"] for r in records if r["kind"] == "step"] == [2, 4, 6]
            assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [0, 1]
            assert trainer.callback_metrics["monitor/teacher_entropy"].item() > 0
            assert trainer.callback_metrics["monitor/target_information"].item() >= 0
        assert (history.parent / "crops.png").exists() is monitor
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_users_callbacks__stay(tiny_cfg, crop_loader, build, fit):
    class Mine(Callback):
        steps = 0

        def on_train_batch_end(self, *args) -> None:
            self.steps += 1

    mine = Mine()
    trainer = fit(build(tiny_cfg(max_epochs=1)), crop_loader(2), callbacks=[mine])
    assert mine in trainer.callbacks
    assert mine.steps == 2
