"""Loggers: what reaches their files, read back from disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from dinovmf_plugin.pretraining import build_trainer
from dinovmf_plugin.training.loggers import build_loggers, close_loggers, log_config, stored_run_ids
from dinovmf_plugin.training.schema import LOGGERS

SCHEDULED = ("lr", "weight_decay", "tau", "teacher_temperature", "student_temperature")


@pytest.fixture
def train(tiny_cfg, crop_loader, build, tmp_path, monkeypatch) -> Any:
    """One epoch of three steps with the given loggers, in one folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(**loggers: Any) -> Path:
        folder = tmp_path / "run"
        nodes = {name: {"enabled": False} for name in ("csv", "wandb", "tensorboard", "mlflow")}
        changes = {**nodes, **loggers, "checkpoint.folder": str(folder), "checkpoint.enabled": True}
        cfg = tiny_cfg("dino_vmf", max_epochs=1, **changes)
        cfg.checkpoint.dir = str(tmp_path)
        OmegaConf.update(cfg, "method_kwargs.final_weight_decay", 0.4, force_add=True)
        for key in ("log_every_n_steps", "seed"):
            OmegaConf.update(cfg, key, 1, force_add=True)
        for key in ("enable_progress_bar", "enable_model_summary"):
            OmegaConf.update(cfg, key, False, force_add=True)
        folder.mkdir(exist_ok=True)
        trainer = build_trainer(cfg, run_ids=stored_run_ids(folder))
        trainer.fit(build(cfg), crop_loader(steps=3))
        close_loggers(trainer.loggers)
        return folder

    return run


def test_tensorboard_and_csv__the_same_numbers(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tensorboard={"enabled": True}, csv={"enabled": True})
    (events,) = folder.glob("tensorboard/version_0/events.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    rows = (folder / "metrics/version_0/metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert set(SCHEDULED) <= set(names) & set(reader.Tags()["scalars"])
    decay = [e.value for e in reader.Scalars("weight_decay")]
    expected = [
        0.4 + 0.5 * (0.04 - 0.4) * (1 + torch.tensor(torch.pi * s / 3).cos().item())
        for s in range(3)
    ]
    assert decay == pytest.approx(expected, rel=1e-5)
    column = [r.split(",")[names.index("weight_decay")] for r in rows[1:]]
    assert [float(value) for value in column if value] == pytest.approx(expected, rel=1e-5)
    hparams = OmegaConf.load(folder / "metrics/version_0/hparams.yaml")
    assert hparams.method_kwargs.num_prototypes == 32


def test_mlflow__metrics_config_and_the_resumed_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    node = {"enabled": True, "tracking_uri": f"file:{tmp_path / 'mlruns'}"}
    folder = train(mlflow=node)
    run_id = stored_run_ids(folder)["mlflow"]
    (home,) = (tmp_path / "mlruns").glob(f"*/{run_id}")
    assert {f.name for f in (home / "metrics").iterdir()} >= set(SCHEDULED)
    assert (home / "params/method").read_text() == "dino_vmf"
    train(mlflow=node)
    assert len((home / "metrics/lr").read_text().splitlines()) == 6
    assert len(list((tmp_path / "mlruns").glob("*/*/params"))) == 1


def test_wandb_offline__config_numbers_and_the_resumed_id(train):
    folder = train(wandb={"enabled": True, "offline": True, "project": "p"})
    run_id = stored_run_ids(folder)["wandb"]
    train(wandb={"enabled": True, "offline": True, "project": "p"})
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
    assert files
    assert len(list(folder.glob("wandb/offline-run-*"))) == len(files)
    written = files[
        0
    ].read_bytes()  # protocol buffers: names and JSON values stand there as they are
    assert re.search(rb'"num_prototypes": ?32\b', written)
    for name in SCHEDULED:
        assert name.encode() in written, name


def test_missing_package__named(tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    nodes = {
        name: {"enabled": name == "wandb"} for name in ("csv", "wandb", "tensorboard", "mlflow")
    }
    with pytest.raises(
        ImportError,
        match=r"wandb\.enabled=True needs a package: pip install 'dinovmf-plugin\[wandb\]'",
    ):
        build_loggers(tiny_cfg(**nodes), tmp_path)


def test_wandb_that_cannot_start__is_one_sentence_before_training(tiny_cfg, tmp_path, monkeypatch):
    from wandb.errors import UsageError

    def refuse(self: Any, parameters: Any) -> None:
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(WandbLogger, "log_hyperparams", refuse)
    nodes = {name: {"enabled": name == "wandb"} for name in LOGGERS}
    cfg = tiny_cfg("dino_vmf", **nodes, **{"checkpoint.folder": str(tmp_path)})
    loggers = build_loggers(cfg, tmp_path)
    with pytest.raises(ValueError, match=r"cannot start \(No API key .*wandb\.offline=True"):
        log_config(loggers, cfg, {})
