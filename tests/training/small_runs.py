"""Trainings of one weight, for what happens to their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from dinovmf_plugin.training.checkpointer import Checkpointer


class Module(LightningModule):
    """One weight that counts the steps."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = torch.nn.Parameter(torch.zeros(1000))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def configure_callbacks(self) -> list[Callback]:
        return [Checkpointer(self.cfg)]


def run_cfg(folder: Path, **changes: Any) -> Any:
    """A recipe that writes its checkpoints below ``folder``."""
    cfg = OmegaConf.create(
        {
            "name": "run",
            "method": "dino_vmf",
            "seed": 0,
            "method_kwargs": {"normalization": "vmf"},
            "data": {"num_workers": 4, "train_path": "x"},
            "checkpoint": {"enabled": True, "dir": str(folder), "frequency": 1, "keep_prev": False},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def train(cfg: Any, epochs: int = 3, ckpt_path: Any = None, callbacks: Any = ()) -> Trainer:
    """Two steps an epoch."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resume = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
    trainer.fit(Module(cfg), torch.utils.data.DataLoader([torch.zeros(1)] * 2), **resume)
    return trainer


def checkpointer_of(trainer: Trainer) -> Checkpointer:
    """The one of a finished training."""
    (found,) = [c for c in trainer.callbacks if isinstance(c, Checkpointer)]
    return found


def files_in(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def first_epoch(folder: Path) -> bytes:
    """A whole checkpoint."""
    return checkpointer_of(train(run_cfg(folder), epochs=1)).last_ckpt.read_bytes()
