import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from dinovmf_plugin.data.dali.color import color_matrices, hue_rotation
from dinovmf_plugin.data.parameters import JITTER_ORDERS, CropParameters

OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def parameters(factors: Any, order: Any, gray: Any) -> CropParameters:
    shape = np.shape(gray)
    zeros, no = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    return CropParameters(
        top=zeros,
        left=zeros,
        height=zeros,
        width=zeros,
        flip=no,
        factors=np.asarray(factors, dtype=float),
        order=np.asarray(order),
        jitter=~no,
        gray=np.asarray(gray),
        blur_radius=np.zeros(shape),
        solarize=no,
        equalize=no,
    )


def applied(pixels: torch.Tensor, a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    flat = pixels.flatten(1).double().numpy()
    mapped = a.astype(float) @ flat + (b.astype(float) @ flat.mean(axis=1))[:, None]
    return torch.from_numpy(mapped).view_as(pixels).float()


@pytest.fixture
def pixels() -> torch.Tensor:
    """A picture in [0, 1] whose values stay inside through every operation."""
    return 0.4 + 0.15 * torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gray", [False, True])
def test_color_matrices__every_order_of_torchvision(pixels: torch.Tensor, gray: bool) -> None:
    rng = np.random.default_rng(0)
    factors = np.stack([*rng.uniform(0.75, 1.3, (3, 24)), np.zeros(24)], axis=-1)
    a, b = color_matrices(parameters(factors, JITTER_ORDERS, np.full(24, gray)))
    assert a.dtype == b.dtype == np.float32
    for n, order in enumerate(JITTER_ORDERS):
        expected = pixels
        for operation in order:
            expected = OPERATIONS[operation](expected, float(factors[n, operation]))
        if gray:
            expected = F.rgb_to_grayscale(expected, num_output_channels=3)
        # torchvision rounds the luma weights to four digits
        torch.testing.assert_close(applied(pixels, a[n], b[n]), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("turns", [-1 / 3, 1 / 3])
def test_hue_rotation__exact_at_thirds_of_a_turn(pixels: torch.Tensor, turns: float) -> None:
    rotated = torch.from_numpy(hue_rotation(np.array(turns))).float() @ pixels.flatten(1)
    torch.testing.assert_close(
        rotated.view_as(pixels), F.adjust_hue(pixels, turns), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.05, 0.1])
def test_hue_rotation__shifts_the_hue_and_keeps_the_rest_on_average(turns: float) -> None:
    colors = np.random.default_rng(0).uniform(0.2, 0.8, (2000, 3))
    rotated = (colors @ hue_rotation(np.array(turns)).T).clip(0, 1)
    before, after = (np.array([colorsys.rgb_to_hsv(*c) for c in x]) for x in (colors, rotated))
    shift = (after[:, 0] - before[:, 0] - turns + 0.5) % 1.0 - 0.5
    assert np.abs(shift).max() < 0.008
    saturation_and_value = (after - before)[:, 1:]
    assert np.abs(saturation_and_value.mean(axis=0)).max() < 0.008
    assert saturation_and_value.std(axis=0).max() < 0.06


def test_color_matrices__identity_without_jitter() -> None:
    a, b = color_matrices(parameters([1.0, 1.0, 1.0, 0.0], JITTER_ORDERS[5], np.array(False)))
    np.testing.assert_allclose(a, np.eye(3), atol=1e-7)
    np.testing.assert_allclose(b, 0.0, atol=1e-7)
