"""The nine small data sets of the paper's Table 5, from local folders; nothing is downloaded.

Train and test as Ericsson et al. use them: official training and validation images together against
the test images where there is a test set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets

from dinovmf_plugin.features.images import DatasetSource, ImageSet, image_folder
from dinovmf_plugin.report.paper import TABLE_5
from dinovmf_plugin.runs.files import listing_digest

__all__ = ["MEAN_PER_CLASS", "caltech101_train_rows", "load_transfer_dataset"]

Pair = tuple[ImageSet, ImageSet]

MEAN_PER_CLASS = frozenset({"aircraft", "caltech101", "flowers102", "pets"})
"""Sets that Ericsson et al. score by mean per-class accuracy, the others by top-1."""

_FOLDERS = {
    "aircraft": "fgvc-aircraft-2013b",
    "caltech101": "caltech101/101_ObjectCategories",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "dtd": "dtd/dtd",
    "flowers102": "flowers-102",
    "food101": "food-101",
    "pets": "oxford-iiit-pet",
    "sun397": "SUN397",
}


def _labels(images: Any) -> list[int]:
    if isinstance(images, ConcatDataset):
        return [label for part in images.datasets for label in _labels(part)]
    # torchvision: .targets (CIFAR) or ._labels (all others); the images need not be opened
    labels = images.targets if hasattr(images, "targets") else images._labels
    return [int(label) for label in labels]


def _image_set(name: str, images: Dataset[Any], classes: int, files: str) -> ImageSet:
    labels = _labels(images)
    listing = f"{name} {len(labels)} {hashlib.sha256(str(labels).encode()).hexdigest()} {files}"
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return ImageSet(
        name,
        DatasetSource(images, labels),
        torch.tensor(labels),
        tuple(str(i) for i in range(classes)),
        digest,
    )


def _from_torchvision(
    name: str, make: Callable[[str], Dataset[Any]], train: Sequence[str], test: str, files: str
) -> Pair:
    parts = [make(split) for split in train]
    fit: Dataset[Any] = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    held = make(test)
    classes = max(_labels(fit) + _labels(held)) + 1
    return (
        _image_set(f"{name}-train", fit, classes, files),
        _image_set(f"{name}-test", held, classes, files),
    )


def _files_of(folder: Path) -> str:
    """Digest of every file below a set's folder, as torchvision has it there."""
    found = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return listing_digest(sorted(found))


def caltech101_train_rows(class_sizes: Sequence[int]) -> list[list[int]]:
    """Training rows of every class, by the rule behind Ericsson et al.'s published split.

    30 draws per class with replacement from one stream of seed 0, the classes (the background class
    included) in the order of their names; repeated draws count once. On the 9,144 images this gives
    their 2,416 training images exactly.

    Example:
        >>> [len(rows) for rows in caltech101_train_rows([467, 435])]
        [28, 27]
    """
    rng = np.random.RandomState(0)  # the published split's generator
    return [sorted({int(i) for i in rng.choice(size, 30)}) for size in class_sizes]


def _caltech101(root: Path) -> Pair:
    images = image_folder(str(root / _FOLDERS["caltech101"]), "transfer.root", check_images="none")
    first = np.flatnonzero(np.diff(images.labels.numpy(), prepend=-1))
    sizes = np.bincount(images.labels.numpy()).tolist()
    train = [
        int(start) + row
        for start, rows in zip(first, caltech101_train_rows(sizes), strict=True)
        for row in rows
    ]
    test = np.setdiff1d(np.arange(len(images)), train).tolist()
    return images.subset(train, "caltech101-train"), images.subset(test, "caltech101-test")


def _sun397(root: Path) -> Pair:
    images = datasets.SUN397(str(root), download=False)
    folder = root / _FOLDERS["sun397"]
    everything = _image_set("sun397", images, 397, _files_of(folder))
    row_of = {
        path.relative_to(folder).as_posix(): row for row, path in enumerate(images._image_files)
    }
    parts = []
    for split, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"SUN397 needs the official partition {folder / file}")
        names = [line.strip().lstrip("/") for line in (folder / file).read_text().splitlines()]
        absent = [name for name in names if name and name not in row_of]
        if absent:
            raise ValueError(f"{folder / file} names {absent[0]}, which is not there")
        rows = [row_of[name] for name in names if name]
        parts.append(everything.subset(rows, f"sun397-{split}"))
    return parts[0], parts[1]


def _by_name(name: str, root: Path) -> Pair:
    at = str(root)
    makers: dict[str, tuple[Callable[[str], Dataset[Any]], tuple[str, ...], str]] = {
        "aircraft": (lambda s: datasets.FGVCAircraft(at, s), ("trainval",), "test"),
        "cifar10": (lambda s: datasets.CIFAR10(at, s == "train"), ("train",), "test"),
        "cifar100": (lambda s: datasets.CIFAR100(at, s == "train"), ("train",), "test"),
        "dtd": (lambda s: datasets.DTD(at, s), ("train", "val"), "test"),
        "flowers102": (lambda s: datasets.Flowers102(at, s), ("train", "val"), "test"),
        "food101": (lambda s: datasets.Food101(at, s), ("train",), "test"),
        "pets": (lambda s: datasets.OxfordIIITPet(at, s), ("trainval",), "test"),
    }
    if name == "caltech101":
        return _caltech101(root)
    if name == "sun397":
        return _sun397(root)
    return _from_torchvision(name, *makers[name], _files_of(root / _FOLDERS[name]))


def load_transfer_dataset(name: str, root: str | Path) -> Pair:
    """Training and test images of a data set below ``root``.

    Args:
        name: one of ``TABLE_5``, laid out as torchvision's class of that set expects; or any folder
            ``root/name`` with ``train`` and ``test`` (or ``val``), one sub-folder per class in each.
        root: the folder that holds the data sets.

    Raises:
        FileNotFoundError: if the set is not there.
        ValueError: if it is there and cannot be used.
    """
    root = Path(root)
    if name in TABLE_5:
        expected = root / _FOLDERS[name]
        missing = f"transfer.datasets: {name} is not at {expected}, where torchvision puts it"
        if not expected.is_dir():
            raise FileNotFoundError(missing)
        try:
            return _by_name(name, root)
        except RuntimeError as error:  # torchvision: not found or corrupted
            raise FileNotFoundError(f"{missing}, or is incomplete: {error}") from error
    train = root / name / "train"
    test = next((p for p in (root / name / "test", root / name / "val") if p.is_dir()), None)
    if not train.is_dir() or test is None:
        raise FileNotFoundError(
            f"transfer.datasets: {name!r} is none of {list(TABLE_5)}, and {root / name} is no folder "
            "with train and test"
        )
    fit = image_folder(str(train), f"{name}-train")
    return fit, image_folder(str(test), f"{name}-test", classes=fit.classes)
