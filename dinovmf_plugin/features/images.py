"""Labelled images for the evaluations, with an identity that the feature cache can trust."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinovmf_plugin.data.channels import IMAGENET
from dinovmf_plugin.data.decoding import to_rgb
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import ImageFolder, list_images, relabel
from dinovmf_plugin.data.loaders import FolderSource, ImageSource
from dinovmf_plugin.data.unreadable import find_unreadable, refuse_or_drop

__all__ = ["DatasetSource", "ImageSet", "describe", "image_folder", "loader_for", "rank_share"]

FORMATS = ("image_folder", "dali")


class DatasetSource:
    """A data set of ``(PIL image, label)``, such as torchvision's, as an ``ImageSource``."""

    def __init__(self, images: Dataset[Any], labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return to_rgb(self.images[index][0])

    def label(self, index: int) -> int:
        """Its class."""
        return int(self.labels[index])


class _SubsetSource:
    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.source.image(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images.

    Attributes:
        name: for messages and file names.
        source: the images and their labels.
        labels: ``(N,)`` int64, those of ``source``.
        classes: names; a label is an index into them.
        digest: hash of the listing: names, file sizes and labels, not pixels.
        folder: the listing where the images are files of a folder, which DALI needs.
    """

    name: str
    source: ImageSource
    labels: Tensor
    classes: tuple[str, ...]
    digest: str
    folder: ImageFolder | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int], name: str | None = None) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        digest = hashlib.sha256(f"{self.digest} {chosen}".encode()).hexdigest()
        folder = self.folder.subset(np.array(chosen, dtype=np.int64)) if self.folder else None
        source = FolderSource(folder) if folder else _SubsetSource(self.source, chosen)
        return ImageSet(
            name or self.name, source, self.labels[chosen], self.classes, digest, folder
        )


def image_folder(
    path: str | None,
    key: str,
    *,
    classes: Sequence[str] = (),
    check_images: str = "fast",
    skip_unreadable: bool = False,
) -> ImageSet:
    """List a folder with one sub-folder of images per class.

    Args:
        path: the folder.
        key: config key for messages, such as ``data.train_path``.
        classes: class names that define the labels, those of the training set; by default the
            folder's own. The folder may lack some of them.
        check_images: ``fast``, ``full`` or ``none``, see ``data.unreadable.find_unreadable``.
        skip_unreadable: leave unreadable images out instead of refusing them.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no images, no class folder, an empty class, a class that is not in
            ``classes``, or an unreadable image.
    """
    if not path:
        raise ValueError(f"{key}={path!r} must be set to a folder with one sub-folder per class")
    folder = list_images(path, key=key)
    if classes:
        folder = relabel(folder, classes, key=key)
    paths = [folder.path(i) for i in range(len(folder))]
    unreadable = find_unreadable(paths, check=check_images)
    try:
        folder = refuse_or_drop(folder, unreadable, skip=skip_unreadable, key=key)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    digest = hashlib.sha256()
    for i, (name, label) in enumerate(zip(folder.names, folder.labels, strict=True)):
        size = os.path.getsize(folder.path(i))
        digest.update(bytes(name) + f"\t{size}\t{label}\n".encode())
    return ImageSet(
        name=key.split(".")[-1].removesuffix("_path"),
        source=FolderSource(folder),
        labels=torch.from_numpy(folder.labels),
        classes=folder.classes,
        digest=digest.hexdigest(),
        folder=folder,
    )


def rank_share(images: ImageSet, rank: int, world_size: int) -> ImageSet:
    """Every ``world_size``-th image from ``rank`` on: shares differ by at most one, none is padded."""
    if world_size == 1:
        return images
    return images.subset(range(rank, len(images), world_size))


def describe(transform: CenterCrop, data_format: str = "image_folder") -> str:
    """A transform in words, as the feature cache and the results record it.

    Example:
        >>> describe(CenterCrop())
        'resize 256 bicubic, centre crop 224, ImageNet normalisation'
    """
    imagenet = (transform.mean, transform.std) == IMAGENET
    own = f"normalisation by mean {transform.mean} and std {transform.std}"
    words = (
        f"resize {transform.resize} {transform.interpolation}, centre crop {transform.size}, "
        f"{'ImageNet normalisation' if imagenet else own}"
    )
    return f"{words}, by DALI" if data_format == "dali" else words


def loader_for(
    images: ImageSet,
    transform: CenterCrop,
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    data_format: str = "image_folder",
    device: torch.device | str = "cpu",
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches ``(images (B, 3, size, size), labels (B,))`` in the listing's order.

    Raises:
        ValueError: if a number makes no sense, the format is unknown, or DALI is asked for images
            that are no files of a folder.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"data.batch_size={batch_size} must be at least 1 and data.num_workers={num_workers} "
            "at least 0"
        )
    if data_format not in FORMATS:
        raise ValueError(f"data.format={data_format!r} must be one of {FORMATS}")
    if data_format == "image_folder":
        workers = min(num_workers, len(images))
        return evaluation_loader(
            images.source, transform=transform, batch_size=batch_size, num_workers=workers
        )
    if images.folder is None:
        raise ValueError(f"data.format=dali reads image folders only, not {images.name}")
    from dinovmf_plugin.data.dali.loaders import DALIEvaluationLoader

    device = torch.device(device)
    return DALIEvaluationLoader(
        images.folder,
        transform=transform,
        batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        num_threads=max(1, num_workers),
    )
