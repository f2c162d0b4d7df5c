"""Resize and center crop of very long pictures, without the pixels that the crop leaves out.

A picture of 1 x 5000 pixels whose shorter side becomes 256 has 1.3 million pixels on the other. Only those
of the crop are made here, to the bit as Pillow makes them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["resized_center"]

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_BITS = 22  # Pillow's fixed point of 8-bit pictures


def _kernel(x: NDArray[np.float64], interpolation: str) -> NDArray[np.float64]:
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.where(x < 1, 1 - x, 0.0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _weights(
    source: int, target: int, start: int, count: int, interpolation: str
) -> list[tuple[int, NDArray[np.int64]]]:
    """First source index and fixed-point weights of the targets ``start .. start + count - 1``."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    weights = []
    for index in range(start, start + count):
        center = (index + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), source)
        offsets = (np.arange(first, last, dtype=np.float64) - center + 0.5) * (1.0 / stretch)
        values = _kernel(offsets, interpolation)
        values = values / math.fsum(values)
        fixed = np.trunc(values * (1 << _BITS) + np.where(values < 0, -0.5, 0.5))
        weights.append((first, fixed.astype(np.int64)))
    return weights


def _along(
    pixels: NDArray[np.uint8], offset: int, weights: list[tuple[int, NDArray[np.int64]]]
) -> NDArray[np.uint8]:
    """Weighted sums over the first axis of ``pixels``, whose first row is row ``offset`` of the picture."""
    rows = []
    for first, values in weights:
        part = pixels[first - offset : first - offset + len(values)].astype(np.int64)
        total = np.tensordot(values, part, axes=1) + (1 << (_BITS - 1))
        rows.append(np.clip(total >> _BITS, 0, 255).astype(np.uint8))
    return np.stack(rows)


@functools.cache
def _tall_pictures_shrink_rows_first() -> bool:
    """Whether this Pillow does; older ones begin with the columns always, and rounding in between differs."""
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 12), dtype=np.uint8))
    whole = tall.resize((8, 64), Image.Resampling.BICUBIC)
    columns_first = tall.resize((8, 96), Image.Resampling.BICUBIC)
    return whole != columns_first.resize((8, 64), Image.Resampling.BICUBIC)


def resized_center(
    image: Image.Image, height: int, width: int, size: int, interpolation: str
) -> Image.Image:
    """The centered square of ``image`` resized to ``height x width``.

    Args:
        image: an RGB picture.
        height: rows after resizing, at least ``size``.
        width: columns after resizing, at least ``size``.
        size: side of the square.
        interpolation: ``bicubic`` or ``bilinear``, antialiased as Pillow does.

    Returns:
        What ``image.resize((width, height)).crop(...)`` gives for pictures four times as long as wide or
        more, to the bit; the larger picture in between is never made.
    """
    resample = _FILTERS[interpolation]
    top, left = round((height - size) / 2), round((width - size) / 2)
    if width >= height:
        weights = _weights(image.width, width, left, size, interpolation)
        begin, end = weights[0][0], max(first + len(values) for first, values in weights)
        strip = np.asarray(image.crop((begin, 0, end, image.height)))
        columns = _along(strip.swapaxes(0, 1), begin, weights).swapaxes(0, 1)
        picture = Image.fromarray(np.ascontiguousarray(columns)).resize((size, height), resample)
        return picture.crop((0, top, size, top + size))
    weights = _weights(image.height, height, top, size, interpolation)
    begin, end = weights[0][0], max(first + len(values) for first, values in weights)
    part = image.crop((0, begin, image.width, end))
    if height < image.height and _tall_pictures_shrink_rows_first():
        picture = Image.fromarray(_along(np.asarray(part), begin, weights))
        return picture.resize((width, size), resample).crop((left, 0, left + size, size))
    part = part.resize((width, end - begin), resample)
    return Image.fromarray(_along(np.asarray(part), begin, weights)).crop(
        (left, 0, left + size, size)
    )
