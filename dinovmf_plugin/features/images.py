"""Labeled images for the evaluations, with an identity that the feature cache can trust."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinovmf_plugin.data.channels import IMAGENET
from dinovmf_plugin.data.decoding import to_rgb
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import take_fraction
from dinovmf_plugin.data.source import ImageSource, Listing, relabel
from dinovmf_plugin.data.unreadable import find_unreadable, refuse_or_drop
from dinovmf_plugin.runs.sources import SourceKeys

__all__ = [
    "DatasetSource",
    "ImageSet",
    "describe",
    "image_folder",
    "loader_for",
    "rank_share",
]

FORMATS = ("image_folder", "dali")


class DatasetSource(ImageSource):
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


class _SubsetSource(ImageSource):
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
    """A labeled set of images.

    Attributes:
        name: for messages and file names.
        source: the images and their labels.
        labels: ``(N,)`` int64, those of ``source``.
        classes: names; a label is an index into them.
        digest: hash of the listing: names, sizes and times of change of the files, and labels.
    """

    name: str
    source: ImageSource
    labels: Tensor
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def describe_image(self, index: int) -> str:
        """The file of an image, or its number where it is none, for messages."""
        if isinstance(self.source, Listing):
            return self.source.path(index)
        return f"image {index} of {self.name}"

    def path(self, index: int) -> str:
        """The file of an image; inside an archive, the path goes on there.

        Raises:
            ValueError: if the images are no files.
        """
        if not isinstance(self.source, Listing):
            raise ValueError(f"{self.name}: the images are no files")
        return self.source.path(index)

    def class_of(self, index: int) -> str:
        """Class name of an image, empty without labels."""
        return self.classes[int(self.labels[index])] if self.classes else ""

    def subset(self, indices: Sequence[int], name: str | None = None) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        digest = hashlib.sha256(f"{self.digest} {chosen}".encode()).hexdigest()
        source: ImageSource
        if isinstance(self.source, Listing):
            source = self.source.subset(np.array(chosen, dtype=np.int64))
        else:
            source = _SubsetSource(self.source, chosen)
        return ImageSet(name or self.name, source, self.labels[chosen], self.classes, digest)


def image_folder(
    path: str | Path | None,
    key: str,
    *,
    classes: Sequence[str] = (),
    labeled: bool | Literal["auto"] = True,
    fraction: float | None = None,
    check_images: str = "fast",
    skip_unreadable: bool = False,
    keys: SourceKeys | None = None,
) -> ImageSet:
    """List images, by default those of a folder with one sub-folder per class.

    Args:
        path: the folder, or what ``keys.source`` reads.
        key: config key for messages, such as ``data.train_path``.
        labeled: whether to read labels; ``auto``: if there are any. Without, labels are -1.
        fraction: share of the images to take, the same of every class; None or -1 for all.
        classes: class names that define the labels, those of the training set; by default the
            folder's own. The folder may lack some of them.
        check_images: ``fast``, ``full`` or ``none``, see ``data.unreadable.find_unreadable``.
        skip_unreadable: leave unreadable images out instead of refusing them.
        keys: the source; by default a folder.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds no images, no class folder, an empty class, a class that is not in
            ``classes``, or an unreadable image.
    """
    if not path:
        raise ValueError(f"{key}={path!r} must be set to a folder with one sub-folder per class")
    location = (keys or SourceKeys()).location(str(path), key)
    found = location.listed(labeled)
    if classes and found.classes:
        found = relabel(found, classes, key=key)
    if fraction is not None:
        found = found.subset(take_fraction(found.labels, fraction))
    unreadable = find_unreadable(found, check=check_images)
    try:
        found = refuse_or_drop(found, unreadable, skip=skip_unreadable, key=key)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if unreadable:
        warnings.warn(f"{key}: {len(unreadable)} unreadable images are left out", stacklevel=2)
    digest = hashlib.sha256()
    for stamp in found.stamps():
        digest.update(stamp)
    return ImageSet(
        name=key.split(".")[-1].removesuffix("_path"),
        source=found,
        labels=torch.from_numpy(found.labels),
        classes=found.classes,
        digest=digest.hexdigest(),
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
        'resize 256 bicubic, center crop 224, ImageNet normalization'
    """
    imagenet = (transform.mean, transform.std) == IMAGENET
    own = f"normalization by mean {transform.mean} and std {transform.std}"
    words = (
        f"resize {transform.resize} {transform.interpolation}, center crop {transform.size}, "
        f"{'ImageNet normalization' if imagenet else own}"
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
            that are no files.
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
    if not isinstance(images.source, Listing):
        raise ValueError(f"data.format=dali reads image files only, not {images.name}")
    from dinovmf_plugin.data.dali.loaders import DALIEvaluationLoader

    device = torch.device(device)
    return DALIEvaluationLoader(
        images.source,
        transform=transform,
        batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        num_threads=max(1, num_workers),
    )
