"""Where the teacher looks: self-attention of the CLS token in the last block, per head."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from dinovmf_plugin.core.vit import last_attention, patch_grid
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.images import ImageSet
from dinovmf_plugin.features.network import Network
from dinovmf_plugin.report.page import Sheet, Thumbnail

__all__ = [
    "attention_sheet",
    "attention_thumbnails",
    "cls_attention",
    "overlay",
    "save_attention",
    "save_model_attention",
]


def cls_attention(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of CLS to the patches as maps.

    Args:
        attention: probabilities of a block, ``(B, heads, T, T)``, CLS first and the patches last
            (register tokens in between are left out).
        grid: rows and columns of patches.

    Returns:
        ``(B, heads, rows, cols)``; sums to one minus what CLS pays to itself and to registers.

    Raises:
        ValueError: if the grid does not fit the tokens.

    Example:
        >>> import torch
        >>> maps = cls_attention(torch.full((1, 3, 5, 5), 0.2), (2, 2))
        >>> maps.shape, round(float(maps[0, 0].sum()), 3)
        (torch.Size([1, 3, 2, 2]), 0.8)
    """
    rows, cols = grid
    tokens = attention.shape[-1]
    if rows * cols >= tokens or attention.ndim != 4:
        raise ValueError(
            f"attention of shape {tuple(attention.shape)} has no CLS beside {rows} x {cols} patches"
        )
    return attention[:, :, 0, tokens - rows * cols :].unflatten(-1, grid)


def overlay(image: NDArray[np.uint8], weight: Tensor, *, colormap: str = "inferno") -> Image.Image:
    """A map on top of its image: strong attention opaque, weak attention shows the image.

    Args:
        image: RGB ``(H, W, 3)``.
        weight: map ``(rows, cols)``; resampled bicubically, scaled to its own minimum and maximum.
        colormap: one of matplotlib's.

    Returns:
        RGB image of the same size.
    """
    height, width = image.shape[:2]
    scaled = F.interpolate(weight[None, None].float(), (height, width), mode="bicubic")[0, 0]
    low, high = scaled.aminmax()
    scaled = ((scaled - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    heat = scaled.cpu().numpy()
    colors = mpl.colormaps[colormap](heat)[..., :3] * 255
    alpha = 0.25 + 0.6 * heat[..., None]
    return Image.fromarray((image * (1 - alpha) + colors * alpha).round().astype(np.uint8))


def attention_sheet(
    image: NDArray[np.uint8], maps: Tensor, *, side: int = 224, gap: int = 8
) -> Image.Image:
    """Image, mean over heads, then every head, side by side.

    Args:
        image: RGB ``(H, W, 3)``.
        maps: ``(heads, rows, cols)``.
        side: smaller images are enlarged to this shorter side.
        gap: pixels between the tiles; gray, to be seen on light and dark pages.
    """
    height, width = image.shape[:2]
    scale = max(1.0, side / min(height, width))
    size = (round(width * scale), round(height * scale))
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    tiles = [Image.fromarray(image), overlay(image, maps.mean(dim=0))]
    tiles += [overlay(image, head) for head in maps]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (len(tiles) * (width + gap) - gap, height), (128, 128, 128))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i * (width + gap), 0))
    return sheet


def save_attention(
    images: Sequence[NDArray[np.uint8]], maps: Tensor, names: Sequence[str], folder: Path
) -> list[Path]:
    """Write one PNG sheet per image into ``folder``.

    Args:
        images: RGB arrays ``(H, W, 3)``.
        maps: ``(B, heads, rows, cols)``.
        names: file names without suffix; unique.
        folder: made if missing.

    Returns:
        The paths.

    Raises:
        ValueError: if the numbers differ or names repeat.
    """
    if not len(images) == len(maps) == len(names) or len(set(names)) < len(names):
        raise ValueError(
            f"{len(images)} images, {len(maps)} maps and {len(set(names))} different names do not fit"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in names]
    for image, heads, path in zip(images, maps, paths, strict=True):
        attention_sheet(image, heads).save(path)
    return paths


@torch.no_grad()
def save_model_attention(
    model: Network, crop: CenterCrop, images: ImageSet, count: int, folder: Path
) -> list[Path]:
    """Write the sheets of ``count`` images, evenly spaced, into ``folder``.

    Args:
        model: a Vision Transformer.
        crop: what it sees of an image; its statistics are the model's.
        images: where they come from.
        count: at most as many as there are images.
        folder: made if missing.

    Returns:
        The paths.
    """
    transform = model.normalized(crop)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    paths: list[Path] = []
    for index in tqdm(chosen, desc="attention maps", unit="img"):
        path = Path(images.path(int(index)))
        pixels = transform(images.source.image(int(index)))
        maps = cls_attention(
            last_attention(model.vit, pixels[None].to(model.prototypes.weight_v.device)),
            patch_grid(model.vit, *pixels.shape[-2:]),
        )
        shown = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        # the index keeps equal file names of different classes apart
        stem = os.fsdecode(os.fsencode(path.stem)[:200])  # with index and suffix within 255 bytes
        paths += save_attention([shown], maps.cpu(), [f"{index:06d}_{stem}"], folder)
    return paths


def attention_thumbnails(paths: Sequence[Path], heads: int) -> Sheet:
    """The written sheets of a model with so many heads, small enough for a page."""
    width = 96 * (heads + 2)
    pictures = []
    for path in paths:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            # twice the CSS size is enough for dense screens
            image.thumbnail((2 * width, 2 * width))
            image.convert("RGB").save(buffer, format="JPEG", quality=85)
        pictures.append(Thumbnail(buffer.getvalue(), width, title=path.stem))
    return Sheet("Self-attention", f"{heads} heads; PNG files in attention/", pictures)
