"""The callbacks that the plugin's methods bring along, whoever builds the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.host.checkpointer import Checkpointer

__all__ = ["method_callbacks"]


def method_callbacks(cfg: DictConfig, settings: Any) -> list[Callback]:
    """The checkpointer, if ``checkpoint.enabled``, and the monitor, if ``method_kwargs.monitor``."""
    callbacks: list[Callback] = []
    checkpointer = None
    if OmegaConf.select(cfg, "checkpoint.enabled", default=False):
        checkpointer = Checkpointer(cfg)
        callbacks.append(checkpointer)
    if settings.monitor:
        from dinovmf_plugin.analysis.callback import MixtureMonitor

        folder = Path(checkpointer.path) if checkpointer else None
        callbacks.append(
            MixtureMonitor(
                every_n_steps=settings.monitor_every,
                stop_on_collapse=settings.stop_on_collapse,
                history_path=folder / "monitor.jsonl" if folder else None,
            )
        )
    return callbacks
