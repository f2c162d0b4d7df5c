"""DAVIS-2017 on disk: frames, palette annotations, lists.

::

    data_path/
      ImageSets/2017/val.txt            names of the sequences
      JPEGImages/480p/bear/00000.jpg    frames
      Annotations/480p/bear/00000.png   palette images: 0 background, 1, 2 ... objects, 255 void
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.data.channels import Statistics
from dinovmf_plugin.data.decoding import open_image

__all__ = [
    "PUBLISHED",
    "VideoSequence",
    "davis_palette",
    "find_sequences",
    "frame_size",
    "read_annotation",
    "read_frame",
    "shrink_annotation",
    "write_annotation",
]

#: Not ImageNet's 0.229: the published numbers were made with 0.228.
PUBLISHED = Statistics((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
VOID = 255


@dataclass(frozen=True)
class VideoSequence:
    """One checked video: frames and their annotations, in order, all of one size."""

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    height: int
    width: int


def davis_palette() -> list[int]:
    """The 256 colors of PASCAL VOC and DAVIS as a flat list of 768 bytes.

    The bits of a label, three at a time from the lowest, go to red, green and blue, highest bit
    first; so neighboring numbers get unlike colors.

    Example:
        >>> palette = davis_palette()
        >>> palette[3:6], palette[6:9], palette[9:12]
        ([128, 0, 0], [0, 128, 0], [128, 128, 0])
    """
    labels = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.int64)
    for place in range(8):
        for channel in range(3):
            colors[:, channel] |= (labels >> (3 * place + channel) & 1) << (7 - place)
    return colors.ravel().tolist()


def write_annotation(path: Path, labels: NDArray[np.integer]) -> None:
    """Save label numbers ``(H, W)`` in 0 .. 255 as a palette PNG.

    Raises:
        ValueError: if a label does not fit in a byte.
    """
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(
            f"{path}: labels reach from {labels.min()} to {labels.max()}, but a palette PNG holds 0 "
            "to 255"
        )
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(davis_palette())
    image.save(path, format="PNG")


def read_annotation(path: Path) -> NDArray[np.uint8]:
    """Label numbers ``(H, W)`` of an annotation image.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is no image of label numbers, or holds more than 255 objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotation {path} is missing")
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except OSError as error:
        raise ValueError(f"annotation {path} cannot be read: {error}") from error
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"annotation {path} is a {mode} image: object numbers are needed (a palette or 8-bit "
            "gray PNG)"
        )
    if labels.max() > 255:
        count = len(np.unique(labels[labels > 0]))
        raise ValueError(
            f"annotation {path} has {count} objects (numbers up to {labels.max()}): more than 255 do "
            "not fit in a palette PNG"
        )
    return labels.astype(np.uint8)


def _names(root: Path, split: str, year: str | int) -> list[str]:
    listing = root / "ImageSets" / str(year) / f"{split}.txt"
    if not root.is_dir():
        raise FileNotFoundError(f"data_path={root} is not a folder")
    if not listing.is_file():
        raise FileNotFoundError(
            f"there is no {listing}: data_path must be DAVIS's own folder (ImageSets, JPEGImages, "
            "Annotations)"
        )
    names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{listing} names no sequence")
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{listing} holds {name!r}, which is not a plain sequence name")
    return names


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _check_sequence(root: Path, resolution: str, name: str) -> VideoSequence:
    folder = root / "JPEGImages" / resolution / name
    if not folder.is_dir():
        raise FileNotFoundError(f"sequence {name}: there is no folder {folder}")
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(frames) < 3:
        raise ValueError(
            f"sequence {name}: {folder} has {len(frames)} .jpg frames, at least 3 are needed (the "
            "first and the last are not scored)"
        )
    stems = [frame.stem for frame in frames]
    twice = next((frame for frame in frames if stems.count(frame.stem) > 1), None)
    if twice is not None:
        raise ValueError(f"sequence {name}: {twice} is there twice, under two suffixes")
    masks = root / "Annotations" / resolution / name
    upper = {path.name for path in masks.glob("*.PNG")}
    annotations = [
        masks / f"{stem}.PNG" if f"{stem}.PNG" in upper else masks / f"{stem}.png" for stem in stems
    ]
    missing = [path for path in annotations if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"sequence {name}: annotation {missing[0]} is missing ({len(missing)} of {len(frames)} are)"
        )
    size = _size(frames[0])
    for path in (*frames, *annotations):
        if (found := _size(path)) != size:
            raise ValueError(
                f"sequence {name}: {path} is {found[1]} x {found[0]} pixels, but the first frame is "
                f"{size[1]} x {size[0]}"
            )
    labels = set(np.unique(read_annotation(annotations[0])).tolist())
    if not labels - {0, VOID}:
        hint = (
            " (255 is void; a DAVIS-2016 mask of 0 and 255 will not do)" if VOID in labels else ""
        )
        raise ValueError(f"sequence {name}: {annotations[0]} shows no object{hint}")
    return VideoSequence(name, tuple(frames), tuple(annotations), *size)


def find_sequences(
    data_path: str | Path,
    *,
    split: str = "val",
    year: str | int = "2017",
    resolution: str = "480p",
    only: Sequence[str] | None = None,
) -> list[VideoSequence]:
    """List and check the sequences of a split before any long work.

    Args:
        data_path: DAVIS's folder.
        split: ``val`` or ``train`` (every frame must be annotated).
        year: folder of the lists.
        resolution: folder of the frames and annotations.
        only: names to take, in this order; None takes all.

    Raises:
        FileNotFoundError: if a folder, list, frame or annotation is missing.
        ValueError: if an image has the wrong size or kind, an annotation has no object or too many,
            or ``only`` names a sequence that is not in the list.
    """
    root = Path(data_path)
    names = _names(root, split, year)
    for name in only or []:
        if name not in names:
            raise ValueError(f"sequence {name!r} is not in ImageSets/{year}/{split}.txt")
    return [_check_sequence(root, resolution, name) for name in only or names]


def frame_size(
    height: int, width: int, shorter: int, patch_size: tuple[int, int]
) -> tuple[int, int]:
    """Pixels ``(height, width)`` at which a frame is shown to the backbone.

    The shorter side becomes ``shorter``; the longer keeps the aspect, floored to a multiple of 64.
    Both are then floored to the patch size, which changes nothing for patches of 8 or 16 at 480.

    Example:
        >>> frame_size(480, 854, 480, (16, 16)), frame_size(1080, 1920, 480, (14, 14))
        ((480, 832), (476, 826))
    """
    if height > width:
        size = (shorter * height // width // 64 * 64, shorter)
    else:
        size = (shorter, shorter * width // height // 64 * 64)
    return size[0] // patch_size[0] * patch_size[0], size[1] // patch_size[1] * patch_size[1]


def read_frame(path: Path, size: tuple[int, int], statistics: Statistics = PUBLISHED) -> Tensor:
    """A frame, resized and normalized, float32 ``(3, H, W)``.

    Bilinear *without* antialiasing, rounded to whole levels, then normalized: as the published numbers
    were made.
    """
    pixels = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]
    scaled = resized.round().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (scaled - mean) / std


def shrink_annotation(labels: NDArray[np.uint8], grid: tuple[int, int]) -> Tensor:
    """Nearest label per patch, int64 ``(rows, cols)``; void becomes background."""
    known = np.where(labels == VOID, 0, labels).astype(np.uint8)
    small: Any = Image.fromarray(known).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(small)).long()
