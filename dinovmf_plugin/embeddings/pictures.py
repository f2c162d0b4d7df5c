"""Images of any kind in memory or on disk, as batches of pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from dinovmf_plugin.data.decoding import open_image, to_rgb
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.loaders import errors_in_one_sentence
from dinovmf_plugin.data.source import ImageSource
from dinovmf_plugin.features.images import image_folder

__all__ = ["Batches", "Images", "batches_of"]

Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
Images = Picture | Sequence[Picture] | Tensor | Iterable[Any]
_TAKEN = (
    "a folder or file, a PIL image, an array (N, H, W, 3) or (N, H, W) of uint8, a list of these, a float "
    "tensor (N, 3, H, W) of normalized pixels, or a loader of batches of such tensors"
)


@dataclass(frozen=True)
class Batches:
    """Images on their way to a network.

    Attributes:
        pixels: normalized batches ``(B, 3, H, W)``.
        names: of the images, where they are known before: paths, else numbers.
        total: how many, or None if only the end tells.
    """

    pixels: Iterable[Tensor]
    names: Callable[[int], str]
    total: int | None


class _Pictures(ImageSource):
    """Pictures by index, as an ``ImageSource``."""

    def __init__(self, pictures: Sequence[Any]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        picture = self.pictures[index]
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        if isinstance(picture, np.ndarray):
            return Image.fromarray(
                picture.squeeze(-1) if picture.shape[-1] == 1 else picture
            ).convert("RGB")
        return open_image(picture)

    def label(self, index: int) -> int:
        """No class."""
        return -1

    def name(self, index: int) -> str:
        """The file, or the number of what is none."""
        picture = self.pictures[index]
        return os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"image {index}"


def _refuse(what: str) -> ValueError:
    return ValueError(f"images={what} is not understood: give {_TAKEN}")


def _check(index: int, picture: Any) -> None:
    """Refuse what is no picture, before anything is computed."""
    if isinstance(picture, np.ndarray):
        gray = picture.ndim == 2
        colored = picture.ndim == 3 and picture.shape[-1] in (1, 3, 4)
        if picture.dtype != np.uint8 or not (gray or colored):
            shape = " x ".join(map(str, picture.shape))
            raise ValueError(
                f"image {index} is an array of {shape} {picture.dtype}: uint8 of (H, W), (H, W, 1), "
                "(H, W, 3) or (H, W, 4) is needed"
            )
    elif isinstance(picture, str | os.PathLike):
        if not Path(picture).is_file():
            raise FileNotFoundError(f"image {index}: there is no file {os.fspath(picture)}")
    elif not isinstance(picture, Image.Image):
        raise _refuse(f"a list with {type(picture).__name__} at {index}")


def _pictures(images: Any) -> Sequence[Any] | None:
    """The pictures one by one; None for what is no collection of pictures."""
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        if path.is_dir():
            found = image_folder(path, "images", labeled=False)
            return [found.path(index) for index in range(len(found))]
        if not path.exists():
            raise FileNotFoundError(f"images={os.fspath(images)!r} is neither a folder nor a file")
        return [images]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        if images.ndim == 3 and images.shape[-1] <= 4:
            raise ValueError(
                f"images is one array of shape {images.shape}: for a single picture give images[None]"
            )
        return list(images)
    return images if isinstance(images, Sequence) else None


def _pixels(batch: Any) -> Tensor:
    """The images of a loader's batch, which may bring labels along."""
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images yields batches of {shape}: tensors (B, 3, H, W) are needed")
    if not images.is_floating_point():
        raise ValueError(
            f"images yields {images.dtype}: pixels must be normalized floats, as the network was trained with"
        )
    return images


def _of_loader(loader: Iterable[Any]) -> Iterator[Tensor]:
    for batch in loader:
        yield _pixels(batch)


def _of_pictures(loader: Iterable[Any]) -> Iterator[Tensor]:
    with errors_in_one_sentence():
        for pixels, _ in loader:
            yield pixels


def batches_of(
    images: Images, transform: CenterCrop, *, batch_size: int, num_workers: int
) -> Batches:
    """Batches of pixels of whatever holds images.

    Args:
        images: a folder (all images at any depth) or a file; a PIL image; an array of uint8, ``(N, H, W, 3)``
            or ``(N, H, W)``; a list of files, PIL images and arrays of one picture each. These are resized,
            cropped and normalized. A float tensor ``(N, 3, H, W)``, and the batches of a loader (alone, or
            first in a tuple or list), are normalized pixels already and stay as they are.
        transform: from a picture to its pixels.
        batch_size: images per batch.
        num_workers: processes that read files; fewer where there are fewer batches.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it is none of these, or holds nothing.

    Example:
        >>> gray = np.zeros((5, 20, 30), dtype=np.uint8)
        >>> batches = batches_of(gray, CenterCrop(18, 16), batch_size=2, num_workers=0)
        >>> [tuple(pixels.shape) for pixels in batches.pixels], batches.total
        ([(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)], 5)
    """
    names: Callable[[int], str] = "image {}".format
    pixels: Iterable[Tensor]
    if isinstance(images, Tensor):
        parts = _pixels(images).split(batch_size) if len(images) else ()
        total, pixels = len(images), parts
    else:
        pictures = _pictures(images)
        if pictures is None:
            if not isinstance(images, Iterable):
                raise _refuse(type(images).__name__)
            length = getattr(getattr(images, "dataset", None), "__len__", None)
            return Batches(_of_loader(images), names, None if length is None else length())
        for index, picture in enumerate(pictures):
            _check(index, picture)
        source = _Pictures(pictures)
        total, names = len(pictures), source.name
        batches = -(-total // batch_size)
        loader = evaluation_loader(
            source,
            transform=transform,
            batch_size=batch_size,
            num_workers=min(num_workers, batches) if batches > 1 else 0,
        )
        pixels = _of_pictures(loader)
    if total == 0:
        raise ValueError("images holds no image")
    return Batches(pixels, names, total)
