"""What the demo records while a method trains: kNN of the teacher, and the epochs' numbers."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dinovmf_plugin.evaluation.features import extract_features
from dinovmf_plugin.evaluation.knn import knn_accuracy

__all__ = ["EpochHistory", "LabelledImages", "evaluate"]

LabelledImages = list[tuple[Tensor, Tensor]]


def evaluate(
    network: nn.Module,
    bank: LabelledImages,
    queries: LabelledImages,
    ks: list[int],
    temperature: float,
) -> tuple[dict[int, tuple[float, float]], Tensor, Tensor]:
    """Weighted kNN of a frozen network.

    Args:
        network: a ViT, or any module that maps images to features.
        bank: batches of labelled training images.
        queries: batches of labelled validation images.
        ks: numbers of neighbours.
        temperature: of the votes.

    Returns:
        ``{k: (top1, top5)}`` in percent, and the features of bank and queries.
    """
    training = network.training
    features, labels = extract_features(network, bank, progress=False)
    query_features, query_labels = extract_features(network, queries, progress=False)
    network.train(training)
    ks = [k for k in ks if k <= len(features)]
    accuracy = knn_accuracy(
        features, labels, query_features, query_labels, ks=ks, temperature=temperature
    )
    return accuracy, features, query_features


class EpochHistory(Callback):
    """Evaluates the teacher every ``every`` epochs and keeps the training curve.

    Args:
        bank: batches of labelled training images.
        queries: batches of labelled validation images.
        k: number of neighbours of the curve.
        temperature: of the votes.
        every: epochs between two evaluations.

    Attributes:
        epochs: one dict per epoch: ``epoch, seconds, loss, top1``.
    """

    def __init__(
        self, bank: LabelledImages, queries: LabelledImages, k: int, temperature: float, every: int
    ) -> None:
        super().__init__()
        self.bank, self.queries = bank, queries
        self.k, self.temperature, self.every = k, temperature, every
        self.epochs: list[dict[str, Any]] = []
        self.evaluation_seconds = 0.0
        self._start = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record the epoch; evaluate if it is due."""
        epoch = trainer.current_epoch
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "seconds": time.monotonic() - self._start,
            "loss": float(trainer.callback_metrics["train_loss"]),
        }
        if (epoch + 1) % self.every == 0 or epoch + 1 == trainer.max_epochs:
            started = time.monotonic()
            state = torch.get_rng_state()
            network = pl_module.momentum_backbone
            accuracy, _, _ = evaluate(network, self.bank, self.queries, [self.k], self.temperature)
            torch.set_rng_state(state)
            record["top1"] = accuracy[self.k][0]
            self.evaluation_seconds += time.monotonic() - started
        self.epochs.append(record)
