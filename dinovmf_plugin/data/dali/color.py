"""Color jitter and grayscale as one affine map of the pixels.

Brightness, contrast, saturation and grayscale are linear in the pixel and the mean pixel of the
crop, and the hue shift is close to a rotation about the gray axis. Any order of them is ``x' = A x
+ B m`` with two 3 x 3 matrices, so an accelerated pipeline needs one pass over the pixels instead
of five.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.parameters import CropParameters

LUMA = np.array([0.299, 0.587, 0.114])


def hue_rotation(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotation of RGB about the gray axis, ``(...,)`` turns -> ``(..., 3, 3)``.

    Exact for the hue shift of the HSV model at multiples of a third of a turn (a permutation of the
    channels) and its natural interpolation between.

    Example:
        >>> red_to_green = hue_rotation(np.array(1 / 3)) @ np.array([1.0, 0.0, 0.0])
        >>> np.allclose(red_to_green, [0.0, 1.0, 0.0])
        True
    """
    angle = 2.0 * np.pi * np.asarray(turns)[..., None, None]
    gray = np.full((3, 3), 1.0 / 3.0)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3.0)
    return gray + np.cos(angle) * (np.eye(3) - gray) + np.sin(angle) * cross


def color_matrices(
    parameters: CropParameters,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Matrices A and B of ``x' = A x + B m``, for a pixel x and the mean pixel m of its crop.

    The operations are those of torchvision's ColorJitter (contrast pivots on the mean luma of the
    picture as it is then) and Grayscale, in the drawn order.

    Args:
        parameters: of any shape ``(...)``.

    Returns:
        Two float32 arrays ``(..., 3, 3)``.

    Differs from upstream:
        torchvision clips to [0, 255] after each operation, here it happens once at the end; the hue
        is rotated, not shifted in HSV.
    """
    factors = parameters.factors
    brightness, contrast, saturation = (factors[..., i, None, None] for i in range(3))
    eye, luma = np.eye(3), np.tile(LUMA, (3, 1))
    linear = np.stack(
        [
            brightness * eye,
            contrast * eye,
            saturation * eye + (1 - saturation) * luma,
            hue_rotation(factors[..., 3]),
        ],
        axis=-3,
    )
    # Only contrast adds a multiple of the mean.
    pivot = np.zeros_like(linear)
    pivot[..., 1, :, :] = (1 - contrast) * luma

    a = np.broadcast_to(eye, (*linear.shape[:-3], 3, 3))
    b = np.zeros_like(a)
    order = parameters.order[..., None, None]
    for position in range(4):
        which = order[..., position : position + 1, :, :]
        step = np.take_along_axis(linear, which, axis=-3)[..., 0, :, :]
        mean_step = np.take_along_axis(pivot, which, axis=-3)[..., 0, :, :]
        a, b = step @ a, step @ b + mean_step @ (a + b)
    gray = parameters.gray[..., None, None]
    a, b = np.where(gray, luma @ a, a), np.where(gray, luma @ b, b)
    return a.astype(np.float32), b.astype(np.float32)
