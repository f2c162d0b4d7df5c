"""Finds unreadable images before training does."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinovmf_plugin.data.decoding import UnreadableImageError, is_plain_jpeg, to_rgb
from dinovmf_plugin.data.source import Listing, Source

T = TypeVar("T", bound=Listing)

CHECKS = ("fast", "full", "none")
_MAX_NAMED = 10
_CHUNK = 256
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


Opener = Callable[[], BinaryIO]


def _full(opener: Opener) -> str | None:
    """Decode; of PNG also the checksums, which PIL passes over and other decoders do not."""
    try:
        with opener() as file:
            data = file.read()
        image: Image.Image = Image.open(io.BytesIO(data))
        to_rgb(image)
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()
    except Exception as error:  # damaged files raise more than PIL documents
        return str(error) or type(error).__name__
    return None


def _fast(opener: Opener) -> str | None:
    """Looks at start and end; decodes what looks wrong, so that no whole image is refused."""
    try:
        with opener() as file:
            if file.read(len(_JPEG_START)) == _JPEG_START:
                # The end marker cannot occur inside the compressed data.
                file.seek(-len(_JPEG_END), os.SEEK_END)
                if file.read() == _JPEG_END and is_plain_jpeg(file):
                    return None
            else:
                file.seek(0)
                image = Image.open(file)
                if image.format == "PNG":
                    image.verify()  # checksums of all chunks, no decoding
                    return None
    except Exception as error:
        return str(error) or type(error).__name__
    return _full(opener)


def problem_of(images: Source, item: Any, check: str = "full") -> str | None:
    """What is wrong with one image of a source, None if it can be read; see :func:`find_unreadable`."""
    return (_fast if check == "fast" else _full)(partial(images.open, item))


def find_unreadable(
    images: Source | Sequence[str],
    *,
    check: str = "fast",
    num_threads: int = 8,
    progress: bool = True,
) -> dict[int, str]:
    """Find images that cannot be read.

    Args:
        images: a source, or paths of files.
        check: ``fast`` reads the headers and the end of JPEG files and the checksums of PNG files,
            and decodes what looks wrong and all other formats; it finds truncated and non-image
            files. ``full`` decodes everything. ``none`` nothing.
        num_threads: files looked at at the same time.
        progress: whether to show a progress bar (for more than a thousand files).

    Returns:
        Index of each unreadable file -> what is wrong with it.

    Raises:
        ValueError: ``check`` is unknown.

    Example:
        >>> find_unreadable([], check="full")
        {}
    """
    if check not in CHECKS:
        raise ValueError(f"data.check_images must be one of {CHECKS}, got {check!r}")
    if check == "none":
        return {}
    inspect = _fast if check == "fast" else _full

    def opener(index: int) -> Opener:
        if isinstance(images, Source):
            return partial(images.open, index)
        return cast(Opener, partial(open, images[index], "rb"))

    starts = range(0, len(images), _CHUNK)
    chunks = [range(start, min(start + _CHUNK, len(images))) for start in starts]
    found: dict[int, str] = {}
    with (
        ThreadPoolExecutor(max(1, num_threads)) as pool,
        tqdm(
            total=len(images),
            desc="checking images",
            unit="image",
            disable=not progress or len(images) <= 1000,
        ) as bar,
    ):
        results = pool.map(lambda chunk: [inspect(opener(i)) for i in chunk], chunks)
        for number, problems in enumerate(results):
            for position, problem in enumerate(problems):
                if problem is not None:
                    found[number * _CHUNK + position] = problem
            bar.update(len(problems))
    return found


def refuse_or_drop(
    images: T,
    unreadable: Mapping[int, str],
    *,
    skip: bool = False,
    key: str = "data.train_path",
) -> T:
    """Refuse unreadable images in one error, or leave them out.

    Args:
        images: the images.
        unreadable: index -> what is wrong, from :func:`find_unreadable`.
        skip: leave them out (``data.skip_unreadable``) instead of raising.
        key: config key of the images, for messages.

    Returns:
        The readable images.

    Raises:
        UnreadableImageError: there are unreadable images and ``skip`` is False (the message names
        them), or nothing else is left.
    """
    if not unreadable:
        return images
    if not skip:
        named = [
            f"{images.path(i)} ({problem})" for i, problem in list(unreadable.items())[:_MAX_NAMED]
        ]
        more = f" and {len(unreadable) - _MAX_NAMED} more" if len(unreadable) > _MAX_NAMED else ""
        raise UnreadableImageError(
            f"{key}: {len(unreadable)} of {len(images)} images cannot be read: {'; '.join(named)}{more}. "
            "Repair or remove them, or set data.skip_unreadable=True to train without them"
        )
    if len(unreadable) == len(images):
        raise UnreadableImageError(
            f"{key}: none of the {len(images)} images in {str(images.root)!r} can be read"
        )
    return images.subset(np.setdiff1d(np.arange(len(images)), np.array(list(unreadable))))
