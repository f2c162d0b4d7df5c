"""Generated JPEG files of ImageNet's size and weight: about 500 x 375 pixels, 110 kB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["write_photos"]


def _enlarged(plane: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(plane.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def write_photos(folder: Path, count: int, *, seed: int = 0) -> None:
    """Write pictures with a photograph's spectrum, so that they cost what photographs cost.

    Args:
        folder: an existing folder.
        count: number of JPEG files, 500 x 375 pixels, every third upright.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = (500, 375) if index % 3 == 2 else (375, 500)
        picture = np.zeros((height, width, 3), dtype=np.float32)
        for octave in range(9):
            coarse = rng.normal(size=(-(-height >> octave) + 1, -(-width >> octave) + 1, 3))
            plane = np.stack([_enlarged(c, height, width) for c in np.moveaxis(coarse, -1, 0)], -1)
            picture += plane * 1.2**octave
        picture = 127.5 + 50.0 * picture / picture.std()
        pixels = picture.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=95)
