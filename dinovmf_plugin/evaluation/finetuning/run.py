"""Fine-tuning from a config to finetune.json: a sweep over learning rates that can be stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dinovmf_plugin.checkpoints.layouts import StoredWeights, read_weights
from dinovmf_plugin.checkpoints.reading import resolve_file
from dinovmf_plugin.core.distributed import Processes, launched_processes
from dinovmf_plugin.data.channels import IMAGENET, channel_statistics
from dinovmf_plugin.evaluation.finetuning import FINETUNE
from dinovmf_plugin.evaluation.finetuning.settings import FinetuneRun
from dinovmf_plugin.evaluation.finetuning.trainer import (
    FineTuner,
    build_classifier,
    training_loader,
)
from dinovmf_plugin.evaluation.logistic.datasets import load_transfer_dataset
from dinovmf_plugin.evaluation.logistic.regression import class_scores
from dinovmf_plugin.evaluation.page import evaluation_page
from dinovmf_plugin.evaluation.workbench import Images
from dinovmf_plugin.features.extraction import extract_feature_set
from dinovmf_plugin.features.images import ImageSet, describe, loader_for, rank_share
from dinovmf_plugin.features.network import random_name
from dinovmf_plugin.features.settings import PRECISIONS
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import file_digest, write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.runs.settings import plain, read

__all__ = ["classification_scores", "finetune"]


def classification_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 (of the first ``min(5, C)``) and mean per-class accuracy in percent.

    Example:
        >>> round(classification_scores(torch.eye(3), torch.tensor([0, 1, 1]))["top1"], 2)
        66.67
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    top1, mean_per_class = class_scores(labels.numpy(), best[:, 0].numpy())
    top5 = 100.0 * float((best == labels[:, None]).any(dim=1).double().mean())
    return {"top1": top1, "top5": top5, "mean_per_class": mean_per_class}


class _Sweep:
    """What all learning rates of a run share."""

    def __init__(self, run: FinetuneRun, train: ImageSet, val: ImageSet) -> None:
        self.run, self.settings, self.train, self.val = run, run.finetune, train, val
        settings = run.finetune
        self.device = pick_device(run.device)
        self.precision = PRECISIONS[run.precision]
        self.checkpoint = run.checkpoint
        self.output = Path(run.output_dir)
        digest, self.statistics = None, IMAGENET
        self.stored: StoredWeights | str = self.checkpoint
        if not self.checkpoint.startswith("random:"):
            self.stored = read_weights(self.checkpoint, run.which)
            digest = file_digest(self.stored.path)
            self.statistics = channel_statistics(self.stored.config)
        self.transform = replace(settings.transform, **self.statistics._asdict())
        self.record = {"checkpoint": self.checkpoint, "sha256": digest, "which": run.which}
        # what a stopped training must agree on before it goes on
        self.binding = {
            **self.record,
            **self.statistics._asdict(),
            **settings.binding,
            "seed": run.seed,
            "precision": run.precision,
            "train_images_digest": train.digest,
            "val_images_digest": val.digest,
        }

    def loader(self, processes: Processes, num_workers: int) -> DataLoader[Any]:
        return training_loader(
            self.train, self.settings, processes, num_workers, self.run.seed, self.statistics
        )

    def build(self) -> nn.Module:
        return build_classifier(
            self.stored,
            len(self.train.classes),
            img_size=self.settings.crop_size,
            drop_path=self.settings.drop_path,
            init_scale=self.settings.init_scale,
            model_name=self.run.model_name,
            num_heads=self.run.num_heads,
            seed=self.run.seed,
        )

    def score(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        data = self.run.data
        loader = loader_for(
            rank_share(self.val, processes.rank, processes.world_size),
            self.transform,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            data_format=data.format,
            device=self.device,
        )
        found, labels = extract_feature_set(
            nn.Sequential(model),  # its output counts, whatever kind of model it is
            loader,
            {"logits": None},
            self.device,
            precision=self.precision,
            distributed=processes.active,
            progress=False,
            name="val",
        )
        return classification_scores(found["logits"], labels)


def _resume(path: Path, tuner: FineTuner, sweep: _Sweep) -> tuple[int, list[dict[str, Any]]]:
    """The epoch to go on with, and the finished epochs."""
    if not (sweep.settings.resume and path.is_file()):
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    tuner.load_state_dict(state["tuner"])
    return len(state["epochs"]), state["epochs"]


def _train(sweep: _Sweep, lr: float, processes: Processes) -> dict[str, Any]:
    """Fine-tune with one learning rate; the scores of every epoch."""
    settings, run = sweep.settings, sweep.run
    loader = sweep.loader(processes, min(run.data.num_workers, len(sweep.train)))
    tuner = FineTuner(
        sweep.build(),
        settings,
        lr,
        len(sweep.train.classes),
        len(loader),
        sweep.device,
        sweep.precision,
        processes,
        run.seed,
    )
    folder = sweep.output / f"finetune_lr{lr:g}"
    start, epochs = _resume(folder / "last.pt", tuner, sweep)
    first = processes.rank == 0
    images = settings.epochs * len(loader) * settings.batch_size // processes.world_size
    done = images * start // settings.epochs
    shown, words = run.progress and first, f"fine-tuning, lr {lr:g}"
    with tqdm(total=images, initial=done, desc=words, unit="img", disable=not shown) as bar:
        for epoch in range(start, settings.epochs):
            losses = []
            for count, loss in tuner.train_epoch(loader, epoch):
                bar.update(count)
                losses.append(loss)
            entry: dict[str, Any] = {"epoch": epoch + 1, "loss": sum(losses) / len(losses)}
            entry |= sweep.score(tuner.model, processes)
            if tuner.ema is not None:
                entry["ema"] = sweep.score(tuner.ema.module, processes)
            better = all(entry["top1"] > earlier["top1"] for earlier in epochs)
            epochs.append(entry)
            bar.set_postfix(epoch=f"{epoch + 1}/{settings.epochs}", top1=f"{entry['top1']:.1f}")
            if first:
                state = {"tuner": tuner.state_dict(), "epochs": epochs}
                write_file(folder / "last.pt", partial(torch.save, state))
                if better:
                    weights = {k: v.contiguous() for k, v in tuner.model.state_dict().items()}
                    write_file(folder / "best.safetensors", save(weights))
    best = max(epochs, key=lambda entry: (entry["top1"], -entry["epoch"]))
    return {
        "lr": lr,
        "scaled_lr": settings.scaled(lr),
        "best": best,
        "last": epochs[-1],
        "epochs": epochs,
    }


def _settings(config: Mapping[str, Any]) -> FinetuneRun:
    run = read(FinetuneRun, config)
    if run.weight_file or run.checkpoint.startswith("timm:"):
        raise ValueError(
            f"checkpoint={run.checkpoint} with weight_file={run.weight_file}: fine-tuning takes a weight "
            "file or random:TIMM_NAME; name the file of a plain ViT as checkpoint"
        )
    if run.checkpoint.startswith("random:"):
        random_name(run.checkpoint)
    else:
        resolve_file(run.checkpoint)
    return run


def finetune(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune a network with every learning rate of ``finetune.lr`` and report the best.

    Writes ``finetune.json`` and ``finetune.html`` into ``output_dir`` (after every learning rate), and per
    learning rate ``last.pt`` (a stopped training goes on from its last epoch) and ``best.safetensors``.

    Args:
        config: hydra's, or plain containers; see configs/finetune.yaml.

    Returns:
        ``best`` (over epochs and learning rates, chosen on the validation set as the paper does),
        ``runs``, ``checkpoint``, ``settings``, ``versions``, ``seconds``.

    Raises:
        FileNotFoundError: if the checkpoint or the images are missing.
        ValueError: if a setting, the images or the network cannot be used, or the loss is not finite.
    """
    config = plain(config)
    run = _settings(config)
    settings = run.finetune
    if settings.dataset is not None:
        train, val = load_transfer_dataset(settings.dataset, str(settings.root))
    else:
        images = Images(run)
        train, val = images.train, images.val
    sweep = _Sweep(run, train, val)
    started = time.monotonic()
    results: dict[str, Any] = {
        "runs": [],
        "selected_on": "validation set (optimistic): epoch and learning rate",
        "checkpoint": sweep.record,
        "settings": asdict(replace(settings, lr=settings.lrs)) | sweep.statistics._asdict(),
        "run_settings": config,
        "transform": describe(sweep.transform, run.data.format),
        "train_images": len(train),
        "val_images": len(val),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(sweep.device),
    }
    with launched_processes(sweep.device) as processes:
        first = processes.rank == 0
        sweep.loader(processes, 0)  # refuses a batch that cannot work
        if first:
            open_run_folder(sweep.output, sweep.binding, ("finetune.json", "finetune.html"))
        for lr in settings.lrs:
            results["runs"].append(_train(sweep, lr, processes))
            best = max(results["runs"], key=lambda found: found["best"]["top1"])
            results["best"] = best["best"] | {"lr": best["lr"]}
            results["seconds"] = round(time.monotonic() - started, 2)
            if first:
                write_json(sweep.output / "finetune.json", results)
        if first:
            print(FINETUNE.text({"fine-tuned": results}))
            subtitle = f"{Path(sweep.checkpoint).name} · {run.which}"
            ours = {"fine-tuned": {FINETUNE.name: results}}
            record = {"subtitle": subtitle, **results}
            page = evaluation_page([FINETUNE], ours, None, FINETUNE.title, record)
            write_file(sweep.output / "finetune.html", page.html())
    return results
