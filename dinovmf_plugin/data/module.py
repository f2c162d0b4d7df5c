"""From a config to a loader: the only file of this room that knows where the config's keys are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from dinovmf_plugin.data.agreement import same_on_all_ranks
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import take_fraction
from dinovmf_plugin.data.loaders import PretrainLoader
from dinovmf_plugin.data.recipe import Recipe, parse_recipe
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.data.source import ImageSource, Listing, Source, relabel
from dinovmf_plugin.data.sources import STREAMS, Location, check_source
from dinovmf_plugin.data.torchvision_sets import TorchvisionSource
from dinovmf_plugin.data.unreadable import find_unreadable, refuse_or_drop

FOLDER_DATASETS = ("imagenet", "imagenet100", "custom")
TORCHVISION_DATASETS = ("cifar10", "cifar100", "stl10")
FORMATS = ("image_folder", "dali")
H5 = "h5"  # as a format: solo-learn's name of a source

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


def image_location(cfg: Mapping[str, Any], key: str = "data.train_path") -> Location:
    """Where the images of a config's ``data.train_path`` or ``data.val_path`` are.

    Args:
        cfg: config with ``data.source`` (``folder``), ``data.train_split``, ``data.val_split``,
            ``data.image_key`` and ``data.label_key``; ``data.format=h5`` is ``data.source=h5``.
        key: of the path.

    Raises:
        ValueError: the path is missing, the source is unknown or contradicts the format.
    """
    path = _get(cfg, key)
    if path is None:
        raise ValueError(f"{key} is missing: the folder or file of the training images")
    source = check_source(_get(cfg, "data.source", "folder"))
    if _choice(cfg, "data.format", (*FORMATS, H5), "image_folder") == H5:
        if source not in ("folder", H5):
            raise ValueError(
                "data.format=h5 is short for data.source=h5 and contradicts "
                f"data.source={source}: leave one out"
            )
        source = H5
    split = _get(cfg, "data.val_split" if key == "data.val_path" else "data.train_split")
    image, label = _get(cfg, "data.image_key"), _get(cfg, "data.label_key")
    return Location(str(path), key, source, split, image, label)


def _check_classes(cfg: Mapping[str, Any], classes: tuple[str, ...]) -> None:
    dataset = _get(cfg, "data.dataset")
    expected = {"imagenet": 1000, "imagenet100": 100}.get(str(dataset), len(classes))
    if len(classes) != expected:
        raise ValueError(
            f"data.train_path={_get(cfg, 'data.train_path')}: the file has {len(classes)} classes, and "
            f"data.dataset={dataset} has {expected}: set data.dataset=custom to train on those of the file"
        )


def _unreadable(images: Listing, check: str, num_threads: int, world_size: int) -> dict[int, str]:
    """Unreadable images; the processes that load together share the work."""
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return find_unreadable(images, check=check, num_threads=num_threads)
    rank = dist.get_rank()
    mine = find_unreadable(
        images.subset(np.arange(rank, len(images), world_size)),
        check=check,
        num_threads=num_threads,
        progress=rank == 0,
    )
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, {rank + world_size * i: p for i, p in mine.items()})
    return dict(sorted(item for found in gathered for item in found.items()))


def _readable(cfg: Mapping[str, Any], images: Listing, key: str, world_size: int) -> Listing:
    check = str(_get(cfg, "data.check_images", "fast"))
    num_threads = 2 * max(1, int(_get(cfg, "data.num_workers", 4)))
    bad = _unreadable(images, check, num_threads, world_size)
    readable = refuse_or_drop(
        images, bad, skip=bool(_get(cfg, "data.skip_unreadable", False)), key=key
    )
    if bad:
        _log.warning("%s: %d unreadable of %d images are left out", key, len(bad), len(images))
    return readable


def _training_stream(
    cfg: Mapping[str, Any], location: Location, rank: int, world_size: int
) -> Source:
    for name, unset in (("fraction", (None, -1, 1)), ("skip_unreadable", (None, False))):
        if (value := _get(cfg, f"data.{name}")) not in unset:
            raise ValueError(
                f"data.{name}={value} needs a source that can seek, and data.source={location.source} is a "
                "stream: data.source=hfds reads the same files by row"
            )
    check = str(_get(cfg, "data.check_images", "fast"))
    labeled = not _get(cfg, "data.no_labels", False)
    return same_on_all_ranks(
        lambda: location.stream(labeled, check, rank, world_size), location.key, world_size
    )


def training_images(cfg: Mapping[str, Any], *, rank: int = 0, world_size: int = 1) -> Source:
    """List and check the images of ``data.train_path``.

    Args:
        cfg: config with the keys of :func:`image_location` and, if wanted, ``data.no_labels`` (default
            False), ``data.fraction`` (-1: all), ``data.check_images`` (``fast``, ``full`` or ``none``),
            ``data.skip_unreadable`` (False) and ``data.num_workers``.
        rank: this process.
        world_size: number of processes that call this together; they share the checking.

    Returns:
        The images to train on.

    Raises:
        FileNotFoundError: the folder or file does not exist.
        ValueError: no images, no classes, or a value out of range.
        RuntimeError: unreadable images that are not to be skipped; the message names them.
    """
    location = image_location(cfg)
    if location.source in STREAMS:
        images = _training_stream(cfg, location, rank, world_size)
    else:

        def listed() -> Listing:
            found = location.listed(not _get(cfg, "data.no_labels", False))
            return found.subset(take_fraction(found.labels, _get(cfg, "data.fraction")))

        agreed = same_on_all_ranks(listed, "data.train_path", world_size)
        images = _readable(cfg, agreed, "data.train_path", world_size)
    if location.source != "folder" and images.classes:
        _check_classes(cfg, images.classes)
    return images


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
            (``image_folder`` or ``dali``), ``dali.device`` (``cpu`` or ``gpu``),
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
        if _get(cfg, "data.source", "folder") != "folder":
            raise ValueError(
                f"data.source={_get(cfg, 'data.source')} does not read data.dataset={dataset}: set "
                "data.dataset=custom"
            )
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

    images = training_images(cfg, rank=rank, world_size=world_size)
    if data_format != "dali":
        return PretrainLoader(images, recipe, plan(len(images)), num_workers=num_workers)
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
    """Build a loader of deterministic center crops, for validation or feature extraction.

    Args:
        cfg: as for :func:`pretrain_loader`; validation images are in ``data.val_path``,
            labeled. Its labels are those of the training set's classes, some of which it may lack.
        train: read ``data.train_path`` (all of it, in order) instead.
        transform: by default the size of the recipe's first crop after a resize to 256/224 of it
            (none for CIFAR and STL-10).
        rank: this process; it takes every ``world_size``-th image (CIFAR and STL-10: all).
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
    else:
        location = image_location(cfg, key)
        labeled = not (train and _get(cfg, "data.no_labels", False))

        def listed() -> Listing:
            images = location.listed(labeled)
            if not train and not _get(cfg, "data.no_labels", False):
                images = relabel(images, image_location(cfg).classes(), key=key)
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
        source = images
    return evaluation_loader(
        source, transform=transform, batch_size=batch_size, num_workers=num_workers
    )
