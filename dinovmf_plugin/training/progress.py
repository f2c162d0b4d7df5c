"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

__all__ = ["LossProgressBar"]


class LossProgressBar(TQDMProgressBar):
    """Lightning's bar with the loss that the method has read already.

    Differs from upstream: a metric logged with ``prog_bar=True`` is read in every step, bar or not, for
    which the processor waits until a GPU has caught up.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's numbers, and ``train_loss`` where the method has one."""
        metrics = super().get_metrics(trainer, pl_module)
        loss = getattr(pl_module, "last_loss", None)
        return metrics if loss is None else {**metrics, "train_loss": loss}
