"""The config inside a training checkpoint: written with it, compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin._version import __version__
from dinovmf_plugin.training.records import REMEDY, NonFiniteLossError

__all__ = ["StoredConfig"]


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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or shape before any weight is touched.

        Raises:
            ValueError: naming the key that differs.
        """
        saved = checkpoint.get("dinovmf_plugin", {}).get("cfg")
        if saved is None:
            return
        # the centre of one centring means nothing to another
        keys = (
            "proj_hidden_dim",
            "proj_output_dim",
            "num_prototypes",
            "normalization",
            "centering",
            "center_raw_scores",  # its unit
        )
        for key in ("method", "backbone.name", *(f"method_kwargs.{key}" for key in keys)):
            old = OmegaConf.select(OmegaConf.create(saved), key)
            new = OmegaConf.select(self.cfg, key)
            if old != new:
                raise ValueError(
                    f"{key}={new!r} differs from the checkpoint's {old!r}: resume with the same value, "
                    "or start a new run (weights alone: method_kwargs.init_from)"
                )
