"""A short training inside Lightning's Trainer, without its files, bars and remarks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["train_quietly"]


def train_quietly(
    module: LightningModule,
    batches: Iterable[Any],
    clock: Callback,
    *,
    accelerator: str,
    precision: str,
) -> None:
    """One epoch over ``batches``, a loader, with ``clock`` watching; nothing is written or shown."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,  # type: ignore[arg-type]
                max_epochs=1,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            ).fit(module, batches)
    finally:
        logger.setLevel(level)
