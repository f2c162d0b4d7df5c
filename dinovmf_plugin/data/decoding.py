"""The one way from an image file to 8-bit RGB: what every reader of pictures calls.

Differs from upstream: PIL's ``convert("RGB")`` cuts 16 bits off at 255, which leaves almost everything
white, and takes floating-point samples for levels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

__all__ = ["UnreadableImageError", "decodable", "is_plain_jpeg", "open_image", "to_rgb"]

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_NO_FRAME_HEADER = (0xC4, 0xC8, 0xCC)  # among 0xC0 .. 0xCF: tables of codes, a reserved number


class UnreadableImageError(RuntimeError):
    """An image file is truncated, is no image, or has no levels; the message names it."""


def _tag(image: Image.Image, tag: int, default: int) -> int:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a PIL image of any mode; transparency is dropped.

    Integers of 9 to 16 bits keep their upper 8 bits: those of gray PNG, of PGM (which PIL scales to 16
    bits) and of TIFF, whose ``BitsPerSample`` counts.

    Args:
        image: as ``PIL.Image.open`` gives it, with the file's format and tags.

    Raises:
        ValueError: signed, 32-bit or floating-point samples: no rule says which is white.

    Example:
        >>> deep = Image.fromarray(np.array([[0, 0x7FFF, 0xFFFF]], dtype=np.uint16))
        >>> to_rgb(deep).getdata(0)[1], to_rgb(deep).mode
        (127, 'RGB')
    """
    is_deep = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PPM", "PNG")
    )
    sample = _tag(image, _SAMPLE_FORMAT, _UNSIGNED)
    if image.mode == "F" or (image.mode == "I" and not is_deep) or sample == _SIGNED:
        kind = {"F": "floating-point", "I": "32-bit or signed"}.get(image.mode, "signed")
        raise ValueError(
            f"its samples are {kind} numbers, which have no agreed black and white: save it with 8 or "
            "16 bits, unsigned"
        )
    if not is_deep:
        return image.convert("RGB")
    bits = _tag(image, _BITS, 16)
    levels = np.asarray(image).astype(np.int32) >> (bits - 8)
    if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # PIL inverts 8 bits, not 16
        levels = 255 - levels
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Any error within, with the name of the file: damaged files raise more than PIL documents."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(
            f"cannot read the image {os.fspath(path)!r}: {reason}"
        ) from error


def _content(path: str | os.PathLike[str], read: Callable[[], bytes] | None) -> bytes:
    return Path(path).read_bytes() if read is None else read()


def open_image(
    path: str | os.PathLike[str], read: Callable[[], bytes] | None = None
) -> Image.Image:
    """Read an image completely, as 8-bit RGB (see :func:`to_rgb`).

    Args:
        path: the file.
        read: gives its content where the path is that of no file, but leads into an archive.

    Raises:
        UnreadableImageError: it cannot be read; the message names the path.
    """
    with _named(path):
        return to_rgb(Image.open(io.BytesIO(_content(path, read))))


def is_plain_jpeg(file: BinaryIO) -> bool:
    """Whether a JPEG file has 8 bits and Huffman codes, by its frame header; moves the file's position.

    Everything that decodes JPEG decodes these; not all know 12 bits, arithmetic codes or lossless frames.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (4, 4)).save(buffer, "JPEG")
        >>> is_plain_jpeg(buffer), is_plain_jpeg(io.BytesIO(b"no JPEG"))
        (True, False)
    """
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        if 0xC0 <= head[1] <= 0xCF and head[1] not in _NO_FRAME_HEADER:
            return head[1] <= 0xC2 and file.read(1) == b"\x08"
        file.seek(int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
    return False


def _same_for_all(image: Image.Image, data: bytes) -> bool:
    """Whether DALI decodes a file to the picture that PIL decodes it to."""
    if image.format == "JPEG":
        is_ycc = image.mode == "L" or image.info.get("adobe_transform", 1) == 1
        return image.mode in ("L", "RGB") and is_ycc and is_plain_jpeg(io.BytesIO(data))
    return image.format == "PNG" and data[24] <= 8  # bits per sample, in the first chunk


def decodable(
    path: str | os.PathLike[str], read: Callable[[], bytes] | None = None
) -> tuple[bytes, int, int]:
    """A file's content for DALI, of which it makes the same picture as :func:`open_image`.

    JPEG and 8-bit PNG files are given as they are. Others, whose decoders differ or which DALI does not know
    (GIF, AVIF, ICO, 12 or 16 bits, CMYK ...), are decoded here and handed on as PPM, without loss.

    Args:
        path: the file.
        read: as for :func:`open_image`.

    Returns:
        Content, height and width in pixels.

    Raises:
        UnreadableImageError: it cannot be read; the message names the file.
    """
    with _named(path):
        data = _content(path, read)
        image: Image.Image = Image.open(io.BytesIO(data))
        if not _same_for_all(image, data):
            image = to_rgb(image)
            data = b"P6\n%d %d\n255\n" % image.size + image.tobytes()
        return data, image.height, image.width
