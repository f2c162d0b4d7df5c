"""The config inside a training checkpoint: written with it, compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin._version import __version__
from dinovmf_plugin.training import resuming
from dinovmf_plugin.training.records import REMEDY, NonFiniteLossError

__all__ = ["ResumedOtherwiseWarning", "StoredConfig"]


class ResumedOtherwiseWarning(UserWarning):
    """A run goes on with other values than those that its checkpoint was trained with."""


class StoredConfig:
    """Mixin of the methods; ``checkpoints`` is the reader of what it writes."""

    cfg: DictConfig
    named_parameters: Callable[[], Iterator[tuple[str, torch.nn.Parameter]]]
    where: Callable[[], str]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the resolved config as plain containers: the file can be read on its own.

        Raises:
            NonFiniteLossError: instead of replacing a good checkpoint by NaN weights (a finite loss may have
                a gradient that is not, and be the last one of its epoch).
        """
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"{name} has NaN or infinite values {self.where()} {REMEDY}"
                )
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        checkpoint["dinovmf_plugin"] = {"version": __version__, "cfg": cfg}

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> str | None:
        """Whether this run can go on from a checkpoint.

        Returns:
            What differs from it without harm, in one sentence; None if nothing does.

        Raises:
            ValueError: naming the key or the tensor that differs.
        """
        saved = checkpoint.get("dinovmf_plugin", {}).get("cfg")
        told = None
        if saved is not None:
            now = OmegaConf.to_container(self.cfg, resolve=True)
            told = resuming.compare_configs(checkpoint, saved, now)
        resuming.check_tensors(checkpoint["state_dict"], self)  # type: ignore[arg-type]
        return told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or shape before any weight is touched; tell other changes.

        Raises:
            ValueError: see ``check_checkpoint``.
        """
        told = self.check_checkpoint(checkpoint)
        if told is not None:
            rank_zero_warn(told, category=ResumedOtherwiseWarning, stacklevel=2)
