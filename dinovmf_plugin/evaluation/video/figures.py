"""Pictures of segmented videos: a contact sheet and an animation, annotation beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dinovmf_plugin.data.decoding import open_image
from dinovmf_plugin.evaluation.video.davis import VOID, davis_palette
from dinovmf_plugin.runs.files import write_file

__all__ = ["contact_sheet", "overlay", "save_animation"]

_CAPTION = 16
_GAP = 4


def overlay(frame: Image.Image, labels: NDArray[np.integer], opacity: float = 0.5) -> Image.Image:
    """A frame with its objects tinted in DAVIS's colors and outlined in white; void is background.

    Args:
        frame: RGB image.
        labels: label numbers of the same height and width.
        opacity: of the tint.
    """
    pixels = np.asarray(frame.convert("RGB"), dtype=np.float32)
    labels = np.where(labels == VOID, 0, labels)
    colors = np.asarray(davis_palette(), dtype=np.float32).reshape(256, 3)[labels]
    mixed = np.where(labels[..., None] > 0, (1 - opacity) * pixels + opacity * colors, pixels)
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    mixed[(labels != padded[1:, :-1]) | (labels != padded[:-1, 1:])] = 255
    return Image.fromarray(mixed.round().astype(np.uint8))


def _cells(frame: Path, sides: Sequence[NDArray[np.integer]], width: int) -> list[Image.Image]:
    image = open_image(frame)
    size = (width, max(1, round(image.height * width / image.width)))
    small = image.resize(size, Image.Resampling.BOX)
    nearest = Image.Resampling.NEAREST
    return [
        overlay(small, np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, nearest)))
        for labels in sides
    ]


def contact_sheet(
    frames: Sequence[Path],
    truth: Sequence[NDArray[np.integer]],
    predicted: Sequence[NDArray[np.integer]],
    *,
    columns: int = 6,
    width: int = 240,
) -> Image.Image:
    """A few frames in a row: annotations above, predictions below.

    Args:
        frames: image files of all frames.
        truth: annotated label numbers of all frames.
        predicted: predicted label numbers of all frames.
        columns: how many frames, evenly spaced from first to last.
        width: of one picture, in pixels.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int)).tolist()
    cells = [_cells(frames[i], (truth[i], predicted[i]), width) for i in chosen]
    height = cells[0][0].height
    sheet = Image.new(
        "RGB",
        (len(chosen) * (width + _GAP) + _GAP, 2 * (height + _CAPTION) + _GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("annotation", "prediction")):
        top = row * (height + _CAPTION)
        for column, (index, pair) in enumerate(zip(chosen, cells, strict=True)):
            left = _GAP + column * (width + _GAP)
            draw.text((left, top + 2), f"{name}, frame {index}", fill="black")
            sheet.paste(pair[row], (left, top + _CAPTION))
    return sheet


def save_animation(
    path: Path,
    frames: Sequence[Path],
    truth: Sequence[NDArray[np.integer]],
    predicted: Sequence[NDArray[np.integer]],
    *,
    width: int = 427,
    fps: int = 12,
) -> None:
    """Write an animation, annotation left and prediction right.

    Args:
        path: a ``.webp`` or ``.gif`` file.
        frames: image files of all frames.
        truth: annotated label numbers of all frames.
        predicted: predicted label numbers of all frames.
        width: of one side, in pixels.
        fps: frames per second.

    Raises:
        ValueError: for another kind of file.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("webp", "gif"):
        raise ValueError(f"animation {path} must end in .webp or .gif")
    pictures = []
    for frame, wanted, ours in zip(frames, truth, predicted, strict=True):
        left, right = _cells(frame, (wanted, ours), width)
        picture = Image.new("RGB", (2 * width + _GAP, left.height), "white")
        picture.paste(left, (0, 0))
        picture.paste(right, (width + _GAP, 0))
        pictures.append(picture)
    write_file(
        path,
        lambda file: pictures[0].save(
            file,
            format=kind.upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / fps),
            loop=0,
        ),
    )
