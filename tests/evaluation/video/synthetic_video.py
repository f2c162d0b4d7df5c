"""Generated videos with exact masks, in DAVIS's layout: a test and a demo without a download.

Blobs with textures of their own move, turn, grow and cover each other before a drifting background.
Object and background textures come from the same recipe, so color alone gives nothing away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dinovmf_plugin.evaluation.video.davis import write_annotation

__all__ = ["moving_objects", "write_moving_objects"]

_TEXTURE = 256


def _texture(rng: np.random.Generator) -> NDArray[np.float64]:
    """Colored noise with a 1/f spectrum, ``(3, 256, 256)``, which tiles."""
    frequency = np.hypot(np.fft.fftfreq(_TEXTURE)[:, None], np.fft.rfftfreq(_TEXTURE)[None]).clip(
        1 / _TEXTURE
    )
    spectrum = np.fft.rfft2(rng.normal(size=(3, _TEXTURE, _TEXTURE))) / frequency
    noise = np.fft.irfft2(spectrum, s=(_TEXTURE, _TEXTURE))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    mixing = rng.normal(size=(3, 3)) * 28
    return np.einsum("cd,dyx->cyx", mixing, noise) + rng.uniform(70, 185, 3)[:, None, None]


def _sample(
    texture: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.stack(
        [ndimage.map_coordinates(channel, (y, x), order=1, mode="grid-wrap") for channel in texture]
    )


@dataclass
class _Blob:
    """A rigid textured shape on a bouncing path; all lengths in pixels, angles in radians."""

    texture: NDArray[np.float64]
    waves: NDArray[np.float64]
    center: NDArray[np.float64]
    velocity: NDArray[np.float64]
    radius: float
    angle: float
    spin: float
    growth: float

    def inside(
        self, rows: NDArray[np.float64], cols: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        """Mask, and the coordinates in the blob's own frame, to which its texture is glued."""
        dy, dx = rows - self.center[0], cols - self.center[1]
        sin, cos = np.sin(self.angle), np.cos(self.angle)
        y, x = (cos * dy - sin * dx) / self.radius, (sin * dy + cos * dx) / self.radius
        theta = np.arctan2(y, x)
        edge = 1 + sum(
            amplitude * np.cos((k + 2) * theta + phase)
            for k, (amplitude, phase) in enumerate(self.waves)
        )
        return np.hypot(y, x) < edge, y, x

    def step(self, size: tuple[int, int]) -> None:
        self.center = self.center + self.velocity
        for axis in range(2):
            low, high = 0.6 * self.radius, size[axis] - 0.6 * self.radius
            if not low <= self.center[axis] <= high:
                self.velocity[axis] *= -1
                self.center[axis] = np.clip(self.center[axis], low, high)
        self.angle += self.spin
        self.radius *= self.growth


def _blob(rng: np.random.Generator, size: tuple[int, int], place: float) -> _Blob:
    radius = rng.uniform(0.14, 0.22) * min(size)
    direction = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.12, 0.2) * radius
    return _Blob(
        texture=_texture(rng),
        waves=np.stack([rng.uniform(0, 0.18, 3), rng.uniform(0, 2 * np.pi, 3)], axis=1),
        center=np.array([rng.uniform(0.3, 0.7) * size[0], place * size[1]]),
        velocity=speed * np.array([np.sin(direction), np.cos(direction)]),
        radius=radius,
        angle=0.0,
        spin=rng.uniform(-0.06, 0.06),
        growth=rng.uniform(0.99, 1.01),
    )


def moving_objects(
    frames: int = 24, size: tuple[int, int] = (240, 426), objects: int = 2, seed: int = 0
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """One generated video.

    Args:
        frames: how many.
        size: pixels ``(height, width)``.
        objects: how many, 1 to 8; a higher number covers a lower one.
        seed: of everything.

    Returns:
        RGB frames ``(H, W, 3)`` and label masks ``(H, W)``.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> frames, masks = moving_objects(frames=3, size=(60, 100), objects=2)
        >>> frames[0].shape, sorted(set(masks[0].ravel().tolist()))
        ((60, 100, 3), [0, 1, 2])
    """
    if frames < 1 or not 1 <= objects <= 8 or min(size) < 32:
        raise ValueError(
            f"frames={frames} must be at least 1, objects={objects} 1 to 8, size={size} at least 32"
        )
    rng = np.random.default_rng(seed)
    background = _texture(rng)
    pan = rng.uniform(-1.5, 1.5, 2)
    # spread over the width, so that the first frame shows them all
    blobs = [_blob(rng, size, (n + 0.5) / objects) for n in range(objects)]
    rows, cols = np.mgrid[: size[0], : size[1]].astype(np.float64)
    pictures, masks = [], []
    for time in range(frames):
        picture = _sample(background, rows + time * pan[0], cols + time * pan[1])
        mask = np.zeros(size, dtype=np.uint8)
        for number, blob in enumerate(blobs, start=1):
            inside, y, x = blob.inside(rows, cols)
            picture = np.where(inside, _sample(blob.texture, y * 40, x * 40), picture)
            mask[inside] = number
            blob.step(size)
        picture += rng.normal(0, 3, picture.shape)
        pictures.append(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        masks.append(mask)
    return pictures, masks


def write_moving_objects(
    root: str | Path,
    *,
    sequences: int = 4,
    frames: int = 24,
    size: tuple[int, int] = (240, 426),
    objects: int = 2,
    seed: int = 0,
) -> list[str]:
    """Write generated videos as a DAVIS folder (split ``val``, resolution ``480p``).

    Args:
        root: a new or empty folder.
        sequences: how many videos.
        frames: of each.
        size: pixels ``(height, width)``.
        objects: of each.
        seed: of the first video; the others count up.

    Returns:
        Names of the sequences.

    Raises:
        ValueError: if ``root`` is not empty, or a number is out of range.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} is not an empty folder: choose a new one")
    names = [f"moving-{number:02d}" for number in range(sequences)]
    for number, name in enumerate(names):
        pictures, masks = moving_objects(frames, size, objects, seed + number)
        images, annotations = (
            root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")
        )
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
            Image.fromarray(picture).save(images / f"{index:05d}.jpg", quality=95)
            write_annotation(annotations / f"{index:05d}.png", mask)
    listing = root / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("".join(f"{name}\n" for name in names))
    return names
