"""What a run records while it trains: loss of every epoch, kNN of the teacher every few."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

__all__ = ["CurveRecorder", "read_curve", "read_monitor"]


class CurveRecorder(Callback):
    """Appends one line per epoch to ``curve.jsonl`` in the run's folder, so that a resumed run goes on.

    Draws no random numbers from training. ``seconds`` count on from where an interrupted run was.

    Args:
        knn: maps the teacher's backbone to its top-1 accuracy in percent.
        every: epochs between two calls of ``knn``; 0 is never.
    """

    def __init__(self, knn: Callable[[nn.Module], float], every: int) -> None:
        super().__init__()
        self.knn, self.every = knn, every
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        earlier = [
            record["seconds"]
            for record in read_curve(Path(pl_module.run_folder))
            if record["epoch"] <= trainer.current_epoch
        ]
        self._start = time.monotonic() - max(earlier, default=0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record the epoch; evaluate if it is due, on the first process."""
        epoch = trainer.current_epoch + 1
        loss = trainer.callback_metrics.get("train_loss")
        record: dict[str, Any] = {
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 2),
            "loss": None if loss is None else float(loss),
        }
        last = trainer.max_epochs is not None and epoch == trainer.max_epochs
        due = self.every and (epoch % self.every == 0 or last)
        network = getattr(pl_module, "momentum_backbone", None)
        if not trainer.is_global_zero:
            return
        if due and network is not None:
            state, training = torch.get_rng_state(), network.training
            record["top1"] = self.knn(network)
            network.train(training)
            torch.set_rng_state(state)
        with open(Path(pl_module.run_folder) / "curve.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Records in the order of epochs; of an epoch that was trained twice, the later one.

    Example:
        >>> read_curve(Path("no such folder"))
        []
    """
    by_epoch = {record["epoch"]: record for record in _records(folder / "curve.jsonl")}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def read_monitor(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of ``monitor.jsonl`` by kind; of a step that was made twice, the later one."""
    kinds: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"step": {}, "epoch": {}, "alarm": {}}
    for record in _records(folder / "monitor.jsonl"):
        if record["kind"] in kinds:
            kinds[record["kind"]][record["step"], record.get("name")] = record
    return {
        kind: [
            {k: v for k, v in records[key].items() if k != "kind"}
            for key in sorted(records, key=lambda k: (k[0], str(k[1])))
        ]
        for kind, records in kinds.items()
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """Parsed lines of a file that may be absent; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
