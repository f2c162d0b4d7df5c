"""Lightning drives epochs and resuming without any wiring."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dinovmf_plugin.data.module import pretrain_loader

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")


class Recorder(LightningModule):
    """Trains one number and writes down which crops it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        indexes, crops, _ = batch
        self.seen.append((self.current_epoch, indexes.tolist(), float(crops[-1].sum())))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint after a training step, or after an epoch, and lets the run go on."""

    def __init__(self, path: Path, step: int | None = None, epoch: int | None = None) -> None:
        self.path, self.step, self.epoch = path, step, epoch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def fit(loader: Any, ckpt_path: Path | None = None, **kwargs: Any) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(
        module, loader, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {})
    )
    return module


@pytest.mark.parametrize("data_format", ["image_folder", "dali"])
@pytest.mark.parametrize(
    ("when", "seen"), [({"epoch": 0}, 5), ({"step": 7}, 7)], ids=["epoch", "step"]
)
def test_resumed_run_sees_what_the_straight_run_saw(
    data_cfg: Any, tmp_path: Path, data_format: str, when: Any, seen: int
) -> None:
    cfg, path = data_cfg(data__format=data_format), tmp_path / "a.ckpt"
    straight = fit(pretrain_loader(cfg), max_epochs=3, callbacks=[SaveAt(path, **when)])
    assert [epoch for epoch, *_ in straight.seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({tuple(indexes) for _, indexes, _ in straight.seen}) == 15
    resumed = fit(pretrain_loader(cfg), path, max_epochs=3)
    assert resumed.seen == straight.seen[seen:]


def test_an_epoch_cut_short_is_followed_by_the_next(data_cfg: Any) -> None:
    whole = fit(pretrain_loader(data_cfg()), max_epochs=2)
    for data_format in ("image_folder", "dali"):
        loader = pretrain_loader(data_cfg(data__format=data_format))
        short = fit(loader, max_epochs=2, limit_train_batches=2)
        expected = [entry[:2] for entry in whole.seen[:2] + whole.seen[5:7]]
        assert [entry[:2] for entry in short.seen] == expected
