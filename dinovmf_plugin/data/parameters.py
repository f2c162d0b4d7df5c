"""Random parameters of crops, drawn once for all backends.

A crop is described completely by numbers (box, flip, jitter factors, blur radius, ...) that are
drawn here, vectorized over a batch, from uniform numbers that depend on (seed, epoch, index) only.
The torchvision and the DALI loader then differ in how they compute pixels, not in what they draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.recipe import ASPECT_RATIO, BLUR_RADIUS, Recipe

Array = npt.NDArray[np.float64]

JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS = np.array(list(permutations(range(4))))

_TRIES = 10
# Columns of the uniform numbers of one crop.
_AREA = slice(0, _TRIES)
_RATIO = slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP, _JITTER = (2 * _TRIES + i for i in range(4))
_FACTORS = slice(2 * _TRIES + 4, 2 * _TRIES + 8)
_ORDER, _GRAY, _BLUR, _RADIUS, _SOLARIZE, _EQUALIZE = (2 * _TRIES + 8 + i for i in range(6))
UNIFORMS_PER_CROP = 2 * _TRIES + 14


@dataclass(frozen=True)
class CropParameters:
    """What was drawn for a batch of crops: arrays of one common shape, plus the axes named below.

    Attributes:
        top: first row of the box, int64 pixels.
        left: first column of the box.
        height: rows of the box.
        width: columns of the box.
        flip: whether to mirror horizontally.
        factors: ``(..., 4)`` brightness, contrast, saturation factors and hue shift (turns); 1, 1,
            1, 0 without jitter.
        order: ``(..., 4)`` order of the jitter operations, indices into ``JITTER_OPERATIONS``.
        jitter: whether the jitter is applied.
        gray: whether to turn gray.
        blur_radius: standard deviation of the blur in pixels, 0 for none.
        solarize: whether to solarise.
        equalize: whether to equalize.
    """

    top: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    height: npt.NDArray[np.int64]
    width: npt.NDArray[np.int64]
    flip: npt.NDArray[np.bool_]
    factors: Array
    order: npt.NDArray[np.int64]
    jitter: npt.NDArray[np.bool_]
    gray: npt.NDArray[np.bool_]
    blur_radius: Array
    solarize: npt.NDArray[np.bool_]
    equalize: npt.NDArray[np.bool_]


def random_boxes(
    uniforms: Array, heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], scale: Array
) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]
]:
    """Boxes of RandomResizedCrop (Inception crops), vectorized.

    Up to ten tries of an area uniform in ``scale`` and a log-uniform aspect ratio in 3/4 to 4/3;
    the first that fits is placed uniformly. If none fits, the largest centered box with an allowed
    aspect ratio.

    Args:
        uniforms: ``(..., UNIFORMS_PER_CROP)`` in [0, 1).
        heights: image heights, broadcastable to the leading shape.
        widths: image widths.
        scale: ``(..., 2)`` smallest and largest area as a share of the image; a NaN pair asks for
            the largest centered square.

    Returns:
        top, left, height and width, int64 of the leading shape.
    """
    shape = uniforms.shape[:-1]
    heights, widths = np.broadcast_to(heights, shape), np.broadcast_to(widths, shape)
    image_h, image_w = heights[..., None].astype(float), widths[..., None].astype(float)

    low, high = scale[..., :1], scale[..., 1:]
    area = image_h * image_w * (low + (high - low) * uniforms[..., _AREA])
    log_low, log_high = np.log(ASPECT_RATIO)
    ratio = np.exp(log_low + (log_high - log_low) * uniforms[..., _RATIO])
    tried_w, tried_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tried_w > 0) & (tried_w <= image_w) & (tried_h > 0) & (tried_h <= image_h)
    first = np.argmax(fits, axis=-1)[..., None]
    found = fits.any(axis=-1)

    # Fallback: the whole image, or its center when its aspect ratio is out of range.
    image_ratio = widths / heights
    full_h = np.where(image_ratio < ASPECT_RATIO[0], np.rint(widths / ASPECT_RATIO[0]), heights)
    full_w = np.where(image_ratio > ASPECT_RATIO[1], np.rint(heights * ASPECT_RATIO[1]), widths)
    square = np.isnan(scale[..., 0])
    side = np.minimum(heights, widths)
    full_h, full_w = np.where(square, side, full_h), np.where(square, side, full_w)

    box_h = np.where(found, np.take_along_axis(tried_h, first, -1)[..., 0], full_h).astype(np.int64)
    box_w = np.where(found, np.take_along_axis(tried_w, first, -1)[..., 0], full_w).astype(np.int64)
    top = np.where(
        found, np.floor(uniforms[..., _TOP] * (heights - box_h + 1)), (heights - box_h) // 2
    )
    left = np.where(
        found, np.floor(uniforms[..., _LEFT] * (widths - box_w + 1)), (widths - box_w) // 2
    )
    return top.astype(np.int64), left.astype(np.int64), box_h, box_w


def draw_parameters(
    recipe: Recipe, uniforms: Array, heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]
) -> CropParameters:
    """Turn uniform numbers into the parameters of all crops of a batch of images.

    Args:
        recipe: the N crops.
        uniforms: ``(B, N, UNIFORMS_PER_CROP)`` float64 in [0, 1).
        heights: ``(B,)`` image heights in pixels.
        widths: ``(B,)`` image widths in pixels.

    Returns:
        Parameters of shape ``(B, N)``.
    """

    def column(name: str) -> Array:
        return np.array([getattr(crop, name) for crop in recipe], dtype=np.float64)

    scale = np.array([crop.scale or (np.nan, np.nan) for crop in recipe])
    scale = np.broadcast_to(scale, (*uniforms.shape[:-1], 2))
    top, left, height, width = random_boxes(uniforms, heights[:, None], widths[:, None], scale)

    jitter = uniforms[..., _JITTER] < column("jitter_prob")
    strength = np.stack([column(name) for name in JITTER_OPERATIONS], axis=-1)
    center = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(center - strength, np.array([0.0, 0.0, 0.0, -0.5]))
    factors = low + (center + strength - low) * uniforms[..., _FACTORS]
    blur = uniforms[..., _BLUR] < column("blur_prob")
    radius = BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * uniforms[..., _RADIUS]
    return CropParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=uniforms[..., _FLIP] < column("flip_prob"),
        factors=np.where(jitter[..., None], factors, center),
        order=JITTER_ORDERS[(uniforms[..., _ORDER] * len(JITTER_ORDERS)).astype(np.int64)],
        jitter=jitter,
        gray=uniforms[..., _GRAY] < column("gray_prob"),
        blur_radius=np.where(blur, radius, 0.0),
        solarize=uniforms[..., _SOLARIZE] < column("solarize_prob"),
        equalize=uniforms[..., _EQUALIZE] < column("equalize_prob"),
    )
