"""What the loaders read: images with a label and a place each; where they lie is the source's business."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinovmf_plugin.data.decoding import decodable, open_image
from dinovmf_plugin.data.sampling import EpochPlan

__all__ = ["NO_LABEL", "ImageSource", "Listing", "Source", "relabel"]

NO_LABEL = -1


class ImageSource(ABC):
    """Images with their labels, told apart by items: indices, where a source does not say otherwise."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, item: Any) -> Image.Image:
        """Image ``item``, RGB; an unreadable one raises an error with its name."""

    @abstractmethod
    def label(self, item: Any) -> int:
        """Its class, or -1."""

    def index(self, item: Any) -> int:
        """Its number, of which its random numbers are drawn."""
        return int(item)

    def batches(self, plan: EpochPlan, epoch: int, start: int) -> Iterator[Sequence[Any]]:
        """Items of this rank's batches ``start .. plan.steps - 1`` of an epoch."""
        for batch in plan.indices(epoch)[start:]:
            yield batch.tolist()


class Source(ImageSource):
    """Encoded images: what DALI can read, too.

    Attributes:
        labels: ``(N,)`` int64 class indices, all -1 without labels.
        classes: class names; empty without labels.
    """

    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    @abstractmethod
    def listing(self) -> bytes:
        """What all processes of a run must have in common."""

    @abstractmethod
    def path(self, item: Any) -> str:
        """Where an image is, for people: the path of its file, or one that goes on inside an archive."""

    @abstractmethod
    def read(self, item: Any) -> bytes:
        """The content of its file."""

    def open(self, item: Any) -> BinaryIO:
        """Its file, to read parts of it."""
        return io.BytesIO(self.read(item))

    def image(self, item: Any) -> Image.Image:
        """Image ``item``, RGB; an unreadable one raises an error with its path."""
        return open_image(self.path(item), partial(self.read, item))

    def encoded(self, item: Any) -> tuple[bytes, int, int]:
        """Content, height and width for DALI, see ``decoding.decodable``."""
        return decodable(self.path(item), partial(self.read, item))


@dataclass(frozen=True)
class Listing(Source):
    """Images that are listed, and read in any order.

    Names are kept as one numpy array of bytes and not as Python strings: worker processes that only
    read it do not copy it page by page, and a million names cost tens of megabytes.

    Attributes:
        root: folder or file that holds them.
        names: ``(N,)`` paths relative to ``root``, as file-system bytes.
        labels: ``(N,)`` int64 class indices, all -1 without labels.
        classes: class names; empty without labels.
    """

    root: Path
    names: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    columns: ClassVar[tuple[str, ...]] = ("names", "labels")
    """Fields with one entry per image."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path of image ``index`` relative to ``root``."""
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Path of image ``index``."""
        return os.path.join(self.root, self.name(index))

    def label(self, index: int) -> int:
        """Class of image ``index``, or -1."""
        return int(self.labels[index])

    def subset(self, indices: npt.NDArray[np.int64]) -> Self:
        """The images ``indices``, in that order; the classes stay as they are."""
        return replace(self, **{name: getattr(self, name)[indices] for name in self.columns})

    def unlabeled(self) -> Self:
        """The same images without labels."""
        return replace(self, labels=np.full(len(self), NO_LABEL, dtype=np.int64), classes=())

    def listing(self) -> bytes:
        """All names and labels."""
        return b"\0".join(self.names.tolist()) + self.labels.tobytes()

    def files(self) -> Iterator[str]:
        """The files whose size and time of change tell whether the images are still the same."""
        yield str(self.root)

    def stamps(self) -> Iterator[bytes]:
        """What the content is known by: the names and labels, and size and time of every file."""
        for name, label in zip(self.names, self.labels, strict=True):
            yield bytes(name) + f"\t{label}\n".encode()
        for file in self.files():
            stat = os.stat(file)
            yield f"{file}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode()


def relabel(images: Listing, classes: Sequence[str], *, key: str) -> Listing:
    """Labels by another list of classes, that of the training set; images may lack some of them.

    Args:
        images: a labeled listing.
        classes: names in the order of the labels.
        key: config key of the images, for messages.

    Raises:
        ValueError: the listing has a class that is not in ``classes``.

    Example:
        >>> from dinovmf_plugin.data.folders import ImageFolder
        >>> names = np.array([b"b/1.png"], dtype=np.bytes_)
        >>> images = ImageFolder(Path("val"), names, np.array([0]), ("b",))
        >>> relabel(images, ["a", "b"], key="data.val_path").labels
        array([1])
    """
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{key}={images.root}: {len(unknown)} of its classes are not in the training set, such as "
            f"{unknown[0]!r}"
        )
    position = {name: i for i, name in enumerate(classes)}
    mapping = np.array([position[name] for name in images.classes], dtype=np.int64)
    labels = np.where(images.labels < 0, NO_LABEL, mapping[images.labels])
    return replace(images, labels=labels, classes=tuple(classes))
