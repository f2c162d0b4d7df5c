"""Fine-tuning on timm's own parts: augmentation, mixup, layer decay, schedule and EMA.

Two recipes of the paper (A.6.5): BEiT-style for ImageNet (layer-wise learning-rate decay, lr swept over
8e-4, 9e-4, 1e-3, 2e-3 and the best reported) and DeiT-style for small data sets (1000 epochs, lr 7.5e-6,
repeated augmentation). configs/evaluation/recipe/ holds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from dinovmf_plugin.checkpoints.architecture import build_vit
from dinovmf_plugin.checkpoints.layouts import StoredWeights
from dinovmf_plugin.checkpoints.loading import backbone_from
from dinovmf_plugin.core.distributed import Processes
from dinovmf_plugin.data.channels import IMAGENET, Statistics
from dinovmf_plugin.data.loaders import leave_signals_to_the_parent, worker_start_method
from dinovmf_plugin.evaluation.finetuning.settings import FinetuneSettings
from dinovmf_plugin.features.images import ImageSet
from dinovmf_plugin.features.network import random_name

__all__ = ["FineTuner", "build_classifier", "training_loader"]


def build_classifier(
    source: StoredWeights | str,
    num_classes: int,
    *,
    img_size: int,
    drop_path: float,
    init_scale: float,
    model_name: str | None = None,
    num_heads: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The checkpoint's ViT with stochastic depth and a new linear classifier on the CLS token.

    Args:
        source: weights as read from a file, or ``random:TIMM_NAME`` to train from scratch.
        num_classes: of the classifier, whose initial weights are scaled by ``init_scale``.
        img_size: training resolution; position embeddings are resampled to it once.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        init_scale: see above.
        model_name: as for ``checkpoints.load_backbone``.
        num_heads: as for ``checkpoints.load_backbone``.
        seed: of the classifier, and of all weights from scratch.

    Raises:
        ValueError: if the weights are no such network, or timm has none of that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(source, str):
            model: Any = timm.create_model(
                random_name(source),
                num_classes=num_classes,
                img_size=img_size,
                drop_path_rate=drop_path,
            )
        else:
            vit, _, shape = backbone_from(
                source, model_name=model_name, num_heads=num_heads, img_size=img_size
            )
            model = build_vit(shape, "", num_classes=num_classes, drop_path_rate=drop_path)
            model.load_state_dict(vit.state_dict() | _head_of(model))
    model.head.weight.data.mul_(init_scale)
    model.head.bias.data.mul_(init_scale)
    return model  # type: ignore[no-any-return]


def _head_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith("head.")}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest ``bits`` of every channel; none leaves black, which Pillow 13 refuses to do.

    Random magnitudes of RandAugment reach 0 bits (about one image in 300 of the recipes).
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits)  # type: ignore[no-any-return]


def _tolerant(transform: Any) -> Any:
    """timm's transform, its posterisation replaced by one that can remove all bits."""
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


class _Augmented(Dataset[tuple[Tensor, int]]):
    def __init__(
        self, images: ImageSet, settings: FinetuneSettings, statistics: Statistics
    ) -> None:
        self.source = images.source
        self.transform = _tolerant(
            create_transform(
                settings.crop_size,
                is_training=True,
                color_jitter=0.0,
                auto_augment=settings.auto_augment,
                interpolation=settings.train_interpolation,
                re_prob=settings.erasing,
                re_mode="pixel",
                mean=statistics.mean,
                std=statistics.std,
            )
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.source.image(index)), self.source.label(index)


def training_loader(
    images: ImageSet,
    settings: FinetuneSettings,
    processes: Processes,
    num_workers: int,
    seed: int,
    statistics: Statistics = IMAGENET,
) -> DataLoader[Any]:
    """Full batches of this process's share; ``loader.sampler.set_epoch`` draws another order.

    Args:
        images: the training set.
        settings: the recipe.
        processes: this process among its siblings.
        num_workers: worker processes.
        seed: of the order.
        statistics: what the images are normalized by.

    Raises:
        ValueError: if the batch is no multiple of the processes, or larger than what an epoch draws.
    """
    rank, world = processes.rank, processes.world_size
    if settings.batch_size % world or (settings.mixes and settings.batch_size // world % 2):
        raise ValueError(
            f"finetune.batch_size={settings.batch_size} must give each of {world} processes the same "
            "number of images, an even one for mixup"
        )
    if settings.batch_size > len(images):
        raise ValueError(
            f"finetune.batch_size={settings.batch_size} exceeds the {len(images)} training images"
        )
    dataset = _Augmented(images, settings, statistics)
    sampler: Sampler[Any]
    if settings.repeated_aug:
        sampler = RepeatAugSampler(dataset, world, rank, num_repeats=settings.repeated_aug)
    else:
        sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=seed)
    loader = DataLoader(
        dataset,
        batch_size=settings.batch_size // world,
        sampler=sampler,
        num_workers=num_workers,
        multiprocessing_context=worker_start_method(num_workers),
        worker_init_fn=leave_signals_to_the_parent,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )
    if not len(loader):
        drawn = len(sampler) * world  # type: ignore[arg-type]
        raise ValueError(
            f"finetune.batch_size={settings.batch_size} exceeds the {drawn} images that an epoch of "
            f"finetune.repeated_aug={settings.repeated_aug} draws of {len(images)}: use at most {drawn}"
        )
    return loader


class FineTuner:
    """One training of one learning rate, an epoch at a time.

    Args:
        model: classifier; moved to ``device``.
        settings: the recipe.
        lr: learning rate as configured, before ``settings.scaled``.
        num_classes: of the data.
        steps_per_epoch: updates per epoch.
        device: where it runs.
        precision: float32, or bfloat16 / float16 for autocast (float16 with loss scaling).
        processes: this process among its siblings.
        seed: of everything random, epoch by epoch, so that a resumed training goes on as it would have.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: FinetuneSettings,
        lr: float,
        num_classes: int,
        steps_per_epoch: int,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        processes: Processes | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.device, self.seed = settings, device, seed
        self.precision, self.steps_per_epoch = precision, steps_per_epoch
        self.processes = processes or Processes()
        self.model = model.to(device)
        self.optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=settings.scaled(lr),
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )
        self.scheduler = self._schedule()
        self.mixup = None
        if settings.mixes:
            self.mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=num_classes,
            )
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=settings.ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.network = self.model
        if self.processes.active:
            self.network = DistributedDataParallel(self.model)

    def _schedule(self) -> Scheduler:
        s = self.settings
        # timm adds a warm-up prefix to the epochs; the recipes count it among them
        epochs = s.epochs - s.warmup_epochs if s.warmup_prefix else s.epochs
        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=epochs,
            min_lr=s.min_lr,
            warmup_lr=s.warmup_lr,
            warmup_epochs=s.warmup_epochs,
            warmup_prefix=s.warmup_prefix,
            step_on_epochs=s.step_on_epochs,
            updates_per_epoch=self.steps_per_epoch,
        )
        assert scheduler is not None  # sched="cosine" always makes one
        return scheduler

    def _seed(self, epoch: int) -> None:
        """Mixup draws from numpy, the workers' augmentation from what torch hands them."""
        value = self.seed + 1_000_003 * epoch + 7919 * self.processes.rank
        torch.manual_seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002  (timm's Mixup draws from there)
        random.seed(value)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def train_epoch(self, loader: Any, epoch: int) -> Iterator[tuple[int, float]]:
        """Train one epoch; yield (images, loss) after every update.

        Raises:
            ValueError: if the loss is not finite.
        """
        self._seed(epoch)
        loader.sampler.set_epoch(epoch)
        self.network.train()
        if self.settings.step_on_epochs:
            self.scheduler.step(epoch)
        for step, (images, labels) in enumerate(loader):
            if not self.settings.step_on_epochs:
                self.scheduler.step_update(epoch * self.steps_per_epoch + step)
            images, labels = images.to(self.device), labels.to(self.device)
            smoothing = self.settings.smoothing
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
                smoothing = 0.0  # mixup smooths its own targets
            with self._autocast():
                logits = self.network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"fine-tuning: the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}: lower "
                    "finetune.lr, or use precision=float32"
                )
            self._update(loss)
            yield len(images), loss.item()

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
