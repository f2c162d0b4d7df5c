"""From a config to a loader: the only file of this room that knows where the config's keys are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from dinovmf_plugin.data.agreement import same_on_all_ranks
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import (
    ImageFolder,
    class_names,
    list_images,
    relabel,
    take_fraction,
)
from dinovmf_plugin.data.h5 import H5Source, h5_classes
from dinovmf_plugin.data.loaders import FolderSource, ImageSource, PretrainLoader
from dinovmf_plugin.data.recipe import Recipe, parse_recipe
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.data.unreadable import find_unreadable, refuse_or_drop

FOLDER_DATASETS = ("imagenet", "imagenet100", "custom")
TORCHVISION_DATASETS = ("cifar10", "cifar100", "stl10")
FORMATS = ("image_folder", "dali")  # of folders
H5 = "h5"

_log = logging.getLogger(__name__)


def _get(cfg: Mapping[str, Any], key: str, default: Any = None) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
        if node is None:
            return default
    return node


def _choice(
    cfg: Mapping[str, Any], key: str, known: tuple[str, ...], default: str | None = None
) -> str:
    value = _get(cfg, key, default)
    if value not in known:
        raise ValueError(f"{key} must be one of {known}, got {value!r}")
    return str(value)


class TorchvisionSource:
    """CIFAR-10, CIFAR-100 or STL-10 as an ``ImageSource``.

    Args:
        name: ``cifar10``, ``cifar100`` or ``stl10``.
        root: folder with the data set as torchvision unpacks it; nothing is downloaded.
        train: training part (STL-10: with its unlabelled images) or test part.
        fraction: share of the images, see :func:`dinovmf_plugin.data.folders.take_fraction`.

    Raises:
        FileNotFoundError: the data set is not there.
    """

    def __init__(
        self, name: str, root: str | Path, *, train: bool = True, fraction: float | None = None
    ) -> None:
        from torchvision import datasets

        try:
            if name == "stl10":
                split = "train+unlabeled" if train else "test"
                self._dataset: Any = datasets.STL10(str(root), split=split, download=False)
                labels = self._dataset.labels
            else:
                kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                self._dataset = kind(str(root), train=train, download=False)
                labels = self._dataset.targets
        except RuntimeError as error:
            raise FileNotFoundError(
                f"data.dataset={name}: the data set is not in {str(root)!r}. Download it once with "
                f"torchvision.datasets.{name.upper()}({str(root)!r}, download=True)"
            ) from error
        self._labels = np.asarray(labels, dtype=np.int64)
        self._indices = take_fraction(self._labels, fraction)

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return self._dataset[self._indices[index]][0]

    def label(self, index: int) -> int:
        """Its class; -1 for STL-10's unlabelled images."""
        return int(self._labels[self._indices[index]])


def _unreadable(
    images: ImageFolder, check: str, num_threads: int, world_size: int
) -> dict[int, str]:
    """Unreadable images; the processes that load together share the work."""
    paths = [images.path(index) for index in range(len(images))]
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return find_unreadable(paths, check=check, num_threads=num_threads)
    rank = dist.get_rank()
    mine = find_unreadable(
        paths[rank::world_size], check=check, num_threads=num_threads, progress=rank == 0
    )
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, {rank + world_size * i: p for i, p in mine.items()})
    return dict(sorted(item for found in gathered for item in found.items()))


def _readable(
    cfg: Mapping[str, Any], images: ImageFolder, key: str, world_size: int
) -> ImageFolder:
    check = str(_get(cfg, "data.check_images", "fast"))
    num_threads = 2 * max(1, int(_get(cfg, "data.num_workers", 4)))
    bad = _unreadable(images, check, num_threads, world_size)
    readable = refuse_or_drop(
        images, bad, skip=bool(_get(cfg, "data.skip_unreadable", False)), key=key
    )
    if bad:
        _log.warning("%s: %d unreadable of %d images are left out", key, len(bad), len(images))
    return readable


def training_images(cfg: Mapping[str, Any], *, world_size: int = 1) -> ImageFolder:
    """List and check the images of ``data.train_path``.

    Args:
        cfg: config with ``data.train_path`` and, if wanted, ``data.no_labels`` (default False),
            ``data.fraction`` (-1: all), ``data.check_images`` (``fast``, ``full`` or ``none``),
            ``data.skip_unreadable`` (False) and ``data.num_workers``.
        world_size: number of processes that call this together; they share the checking.

    Returns:
        The images to train on.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no images, no classes, or a value out of range.
        RuntimeError: unreadable images that are not to be skipped; the message names them.
    """
    root = _get(cfg, "data.train_path")
    if root is None:
        raise ValueError("data.train_path is missing: the folder of the training images")

    def listed() -> ImageFolder:
        images = list_images(root, labeled=not _get(cfg, "data.no_labels", False))
        return images.subset(take_fraction(images.labels, _get(cfg, "data.fraction")))

    images = same_on_all_ranks(listed, "data.train_path", world_size)
    return _readable(cfg, images, "data.train_path", world_size)


def _h5_source(
    cfg: Mapping[str, Any],
    key: str,
    rank: int = 0,
    world_size: int = 1,
    fraction: float | None = None,
) -> H5Source:
    """The images of an HDF5 file, labelled by the training file's classes."""
    path = _get(cfg, key)
    if path is None:
        raise ValueError(f"{key} is missing: the HDF5 file of the training images")
    if _get(cfg, "data.no_labels", False):
        raise ValueError(
            "data.no_labels=True is for folders: the groups of an HDF5 file are classes"
        )
    dataset = _get(cfg, "data.dataset")
    classes = h5_classes(_get(cfg, "data.train_path"))
    expected = {"imagenet": 1000, "imagenet100": 100}.get(str(dataset), len(classes))
    if len(classes) != expected:
        raise ValueError(
            f"data.train_path={_get(cfg, 'data.train_path')}: the file has {len(classes)} classes, and "
            f"data.dataset={dataset} has {expected}: set data.dataset=custom to train on those of the file"
        )
    return H5Source(
        path, classes=classes, rank=rank, world_size=world_size, fraction=fraction, key=key
    )


def pretrain_loader(
    cfg: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
    device_id: int | None = None,
) -> ResumableLoader:
    """Build the training loader of a config.

    Args:
        cfg: the run's config (plain containers or OmegaConf): ``data.dataset``, ``data.format``
            (``image_folder``, ``dali`` or ``h5``), ``dali.device`` (``cpu`` or ``gpu``),
            ``optimizer.batch_size``, ``augmentations``, ``seed`` and the keys of
            :func:`training_images`. ``dali.encode_indexes_into_labels`` needs no reading: indexes
            are always the true ones.
        rank: this process.
        world_size: number of processes.
        seed: overrides ``cfg.seed`` (5 if neither is given, solo-learn's default); the same on all
            ranks.
        device_id: GPU of this process for ``dali.device=gpu``.

    Returns:
        Loader of ``[indexes, [crops], targets]``; see
        :class:`dinovmf_plugin.data.sampling.ResumableLoader` for resuming.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: what is wrong with the config or the images, in
        one sentence.
    """
    dataset = _choice(cfg, "data.dataset", FOLDER_DATASETS + TORCHVISION_DATASETS)
    data_format = _choice(cfg, "data.format", (*FORMATS, H5), "image_folder")
    recipe = parse_recipe(_get(cfg, "augmentations", ()), dataset=dataset)
    batch_size = _get(cfg, "optimizer.batch_size")
    if batch_size is None:
        raise ValueError("optimizer.batch_size is missing: images per step on one process")
    seed = int(_get(cfg, "seed", 5)) if seed is None else seed
    num_workers = int(_get(cfg, "data.num_workers", 4))

    def plan(num_samples: int) -> EpochPlan:
        return EpochPlan(num_samples, int(batch_size), seed, rank, world_size)

    if dataset in TORCHVISION_DATASETS:
        if data_format != "image_folder":
            raise ValueError(
                f"data.format={data_format} reads image folders only, set "
                f"data.format=image_folder for {dataset}"
            )
        fraction = _get(cfg, "data.fraction")
        source: ImageSource = TorchvisionSource(
            dataset, _get(cfg, "data.train_path"), fraction=fraction
        )
        return PretrainLoader(source, recipe, plan(len(source)), num_workers=num_workers)

    if data_format == H5:
        source = _h5_source(cfg, "data.train_path", fraction=_get(cfg, "data.fraction"))
        return PretrainLoader(source, recipe, plan(len(source)), num_workers=num_workers)
    images = training_images(cfg, world_size=world_size)
    if data_format == "image_folder":
        return PretrainLoader(
            FolderSource(images), recipe, plan(len(images)), num_workers=num_workers
        )
    from dinovmf_plugin.data.dali.loaders import DALILoader

    return DALILoader(
        images,
        recipe,
        plan(len(images)),
        device=str(_get(cfg, "dali.device", "gpu")),
        device_id=device_id,
        num_threads=num_workers,
    )


def _default_center_crop(recipe: Recipe, dataset: str) -> CenterCrop:
    first = recipe[0]
    resize = first.size if dataset in TORCHVISION_DATASETS else round(first.size * 256 / 224)
    return CenterCrop(resize, first.size, first.interpolation, first.mean, first.std)


def validation_loader(
    cfg: Mapping[str, Any],
    *,
    train: bool = False,
    transform: CenterCrop | None = None,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
) -> Any:
    """Build a loader of deterministic centre crops, for validation or feature extraction.

    Args:
        cfg: as for :func:`pretrain_loader`; validation images are in ``data.val_path``, a labelled
            folder. Its labels are those of the training folder's classes, some of which it may lack.
        train: read ``data.train_path`` (all of it, in order) instead.
        transform: by default the size of the recipe's first crop after a resize to 256/224 of it
            (none for CIFAR and STL-10).
        rank: this process; it takes every ``world_size``-th image of a folder (CIFAR and STL-10: all).
        world_size: number of processes that call this together.
        device_id: GPU of this process for ``dali.device=gpu``.

    Returns:
        Iterable of ``(images, targets)``, or None without ``data.val_path``.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as :func:`pretrain_loader`.
    """
    key = "data.train_path" if train else "data.val_path"
    root = _get(cfg, key)
    if root is None:
        return None
    dataset = _choice(cfg, "data.dataset", FOLDER_DATASETS + TORCHVISION_DATASETS)
    data_format = _choice(cfg, "data.format", (*FORMATS, H5), "image_folder")
    batch_size, num_workers = (
        int(_get(cfg, "optimizer.batch_size", 64)),
        int(_get(cfg, "data.num_workers", 4)),
    )
    if transform is None:
        transform = _default_center_crop(
            parse_recipe(_get(cfg, "augmentations", ()), dataset=dataset), dataset
        )

    if dataset in TORCHVISION_DATASETS:
        source: ImageSource = TorchvisionSource(dataset, root, train=train)
    elif data_format == H5:
        source = _h5_source(cfg, key, rank, world_size)
    else:
        labeled = not (train and _get(cfg, "data.no_labels", False))

        def listed() -> ImageFolder:
            images = list_images(root, labeled=labeled, key=key)
            if not train and not _get(cfg, "data.no_labels", False):
                images = relabel(images, class_names(_get(cfg, "data.train_path")), key=key)
            return images

        images = same_on_all_ranks(listed, key, world_size)
        images = _readable(cfg, images, key, world_size)
        images = images.subset(np.arange(rank, len(images), world_size))
        if data_format == "dali":
            from dinovmf_plugin.data.dali.loaders import DALIEvaluationLoader

            return DALIEvaluationLoader(
                images,
                transform=transform,
                batch_size=batch_size,
                device=str(_get(cfg, "dali.device", "gpu")),
                device_id=device_id,
                num_threads=num_workers,
            )
        source = FolderSource(images)
    return evaluation_loader(
        source, transform=transform, batch_size=batch_size, num_workers=num_workers
    )
