"""Linear probes from images: one pass of the backbone per epoch serves every feature and rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from dinovmf_plugin.data.channels import Statistics
from dinovmf_plugin.data.loaders import leave_signals_to_the_parent, worker_start_method
from dinovmf_plugin.data.transforms import INTERPOLATION_MODES
from dinovmf_plugin.evaluation.linear.probes import train_probes
from dinovmf_plugin.evaluation.linear.scores import (
    PROTOCOL_LR,
    holdout_rows,
    scaled_lrs,
    summarize_probes,
)
from dinovmf_plugin.evaluation.linear.settings import LinearSettings
from dinovmf_plugin.evaluation.settings import EvaluationSettings
from dinovmf_plugin.evaluation.workbench import Images, Run, Workbench
from dinovmf_plugin.features.extraction import backbone_features, resolve_feature
from dinovmf_plugin.features.images import ImageSet, describe
from dinovmf_plugin.features.settings import PRECISIONS

__all__ = ["prepare_linear"]

Batch = tuple[dict[str, Tensor], Tensor]


class _Augmented(Dataset[tuple[Tensor, int]]):
    """The protocol's random resized crops and flips."""

    def __init__(self, images: ImageSet, settings: LinearSettings, statistics: Statistics) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    settings.crop_size,
                    scale=(settings.min_scale, 1.0),
                    interpolation=INTERPOLATION_MODES[settings.train_interpolation],
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*statistics),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source = self.images.source
        return self.transform(source.image(index)), source.label(index)


def _share(batch_size: int, world_size: int) -> int:
    if batch_size % world_size:
        raise ValueError(
            f"linear.batch_size={batch_size} is the batch of all processes and must be a multiple of "
            f"their number, {world_size}"
        )
    return batch_size // world_size


def _sampler(images: Any, bench: Workbench, seed: int) -> DistributedSampler[Any]:
    """One order per epoch for any number of processes; DINO's own sampler."""
    processes = bench.processes
    return DistributedSampler(images, processes.world_size, processes.rank, shuffle=True, seed=seed)


def _augmented_batches(
    images: ImageSet, settings: LinearSettings, bench: Workbench, seed: int
) -> Callable[[int], Iterator[Batch]]:
    data = bench.settings.data
    dataset = _Augmented(images, settings, bench.backbone.statistics)
    sampler = _sampler(dataset, bench, seed)
    workers = min(data.num_workers, len(images))
    loader = DataLoader(
        dataset,
        batch_size=_share(settings.batch_size, bench.processes.world_size),
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=worker_start_method(workers),
        worker_init_fn=leave_signals_to_the_parent,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )
    model = bench.backbone.model.to(bench.device).eval()
    names = _names(settings.features, model)
    specs = [resolve_feature(feature, model) for feature in names.values()]
    dtype = PRECISIONS[bench.settings.precision]

    def batches(epoch: int) -> Iterator[Batch]:
        sampler.set_epoch(epoch)
        for images_, labels in loader:
            parts = []
            # the probes' batch is large; the network sees it in pieces of data.batch_size
            for piece in images_.split(data.batch_size):
                amp = (
                    torch.autocast(bench.device.type, dtype)
                    if dtype != torch.float32
                    else nullcontext()
                )
                with torch.no_grad(), amp:
                    parts.append(backbone_features(model, piece.to(bench.device), specs))
            columns = [torch.cat(column) for column in zip(*parts, strict=True)]
            yield dict(zip(names, columns, strict=True)), labels

    return batches


def _cached_batches(
    features: Mapping[str, Tensor],
    labels: Tensor,
    settings: LinearSettings,
    bench: Workbench,
    seed: int,
) -> Callable[[int], Iterator[Batch]]:
    sampler = _sampler(labels, bench, seed)
    size = _share(settings.batch_size, bench.processes.world_size)

    def batches(epoch: int) -> Iterator[Batch]:
        sampler.set_epoch(epoch)
        for part in torch.tensor(list(sampler)).split(size):
            yield {name: value[part] for name, value in features.items()}, labels[part]

    return batches


def _names(features: Any, model: nn.Module) -> dict[str, Any]:
    """Names for the results: a feature's own, or its place in the list; ``output`` without tokens."""
    if resolve_feature(features[0], model) is None:
        return {"output": features[0]}
    return {
        feature if isinstance(feature, str) else f"feature{i + 1}": feature
        for i, feature in enumerate(features)
    }


def prepare_linear(settings: LinearSettings, images: Images, run: EvaluationSettings) -> Run:
    """Cut off the held-out images and check the classes."""
    fit, held = holdout_rows(images.train.labels, settings.holdout, run.seed)
    train, val = images.train.subset(fit, "train"), images.val
    if not held:
        train = images.train

    def linear(bench: Workbench) -> dict[str, Any]:
        names, crop = _names(settings.features, bench.backbone.model), bench.transform(settings)
        sets = {"val": bench.features(val, names, crop)}
        if held:
            kept = images.train.subset(held, "held-out")
            sets["holdout"] = bench.features(kept, names, crop)
        if settings.augment:
            batches = _augmented_batches(train, settings, bench, run.seed)
        else:
            cached, labels = bench.features(train, names, crop)
            batches = _cached_batches(cached, labels, settings, bench, run.seed)
        with torch.random.fork_rng():
            torch.manual_seed(run.seed + bench.processes.rank)  # crops without worker processes
            history = train_probes(
                batches,
                sets,
                len(images.train.classes),
                lrs=scaled_lrs(settings.lrs, settings.batch_size),
                epochs=settings.epochs,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                seed=run.seed,
                device=bench.device,
                distributed=bench.processes.active,
                progress=bench.progress,
            )
        report = summarize_probes(history, settings.lrs, PROTOCOL_LR)
        for name, feature in names.items():
            report[name]["feature"] = bench.describe_feature(feature)
            report[name]["dim"] = sets["val"][0][name].shape[1]
        words = (
            f"random resized crop {settings.crop_size} ({settings.min_scale:g}-1, "
            f"{settings.train_interpolation}), flip"
        )
        test = describe(crop, run.data.format)
        return {
            "features": report,
            "lr_scaling": f"lr * {settings.batch_size} / 256",
            "train_transform": words if settings.augment else test,
            "transform": test,
            "train_images": len(train),
            "val_images": len(val),
        }

    return linear
