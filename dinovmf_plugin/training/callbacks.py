"""The callbacks that the plugin's methods bring along, whoever builds the Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.data.channels import channel_statistics
from dinovmf_plugin.training.checkpointer import Checkpointer
from dinovmf_plugin.training.crops import CropCheck
from dinovmf_plugin.training.loggers import RunIds
from dinovmf_plugin.training.peers import PeerWatch

__all__ = ["method_callbacks"]


def method_callbacks(cfg: DictConfig, settings: Any) -> list[Callback]:
    """Checkpointer and ids (``checkpoint.enabled``), crop check and monitor (``method_kwargs.monitor``).

    In any case the watch that ends the other ranks when one stops.
    """
    callbacks: list[Callback] = []
    if OmegaConf.select(cfg, "checkpoint.enabled", default=False):
        callbacks += [Checkpointer(cfg), RunIds()]
    if settings.monitor:
        from dinovmf_plugin.training.monitor import MixtureMonitor

        in_folder = bool(callbacks)
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        mean, std = channel_statistics(plain)
        callbacks.append(CropCheck(mean, std, cfg.data.num_large_crops, write=in_folder))
        history = "monitor.jsonl" if in_folder else None  # in the run's folder
        callbacks.append(
            MixtureMonitor(
                every_n_steps=settings.monitor_every,
                stop_on_collapse=settings.stop_on_collapse,
                warmup_epochs=OmegaConf.select(cfg, "scheduler.warmup_epochs", default=0) or 0,
                history_path=history,
            )
        )
    # after the checkpointer: what stops all ranks together is saved before they part
    return [*callbacks, PeerWatch()]
