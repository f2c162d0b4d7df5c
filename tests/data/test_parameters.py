from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms

from dinovmf_plugin.data.parameters import UNIFORMS_PER_CROP, draw_parameters
from dinovmf_plugin.data.recipe import parse_recipe


def draw(
    pipelines: list[dict[str, Any]], count: int, height: int, width: int, seed: int = 0
) -> Any:
    recipe = parse_recipe(pipelines)
    uniforms = np.random.default_rng(seed).random((count, len(recipe), UNIFORMS_PER_CROP))
    return draw_parameters(recipe, uniforms, np.full(count, height), np.full(count, width))


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.25, 1.0)), (375, 500, (0.05, 0.25)), (100, 260, (0.4, 1.0))],
)
def test_boxes__distribution_of_torchvision(
    make_pipeline: Any, height: int, width: int, scale: Any
) -> None:
    count = 3000
    drawn = draw([make_pipeline(scale=scale)], count, height, width)
    torch.manual_seed(0)
    picture = Image.new("RGB", (width, height))
    reference = np.array(
        [
            transforms.RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3))
            for _ in range(count)
        ]
    )
    ours = np.stack([drawn.top, drawn.left, drawn.height, drawn.width], axis=-1)[:, 0]
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for axis in range(4):
        assert stats.ks_2samp(ours[:, axis], reference[:, axis]).pvalue > 1e-3
    for value in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert stats.ks_2samp(value(ours), value(reference)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (300, 300)])
def test_boxes__fallback_of_torchvision(make_pipeline: Any, height: int, width: int) -> None:
    """The whole area of a long image has no allowed aspect ratio: the largest centered box that has one."""
    drawn = draw([make_pipeline(scale=(1.0, 1.0))], 1, height, width)
    picture = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    expected = transforms.RandomResizedCrop.get_params(picture, (1.0, 1.0), (3 / 4, 4 / 3))
    if height == width:  # fits only by chance, elsewhere never
        assert drawn.height[0, 0] <= height
        return
    assert (drawn.top[0, 0], drawn.left[0, 0], drawn.height[0, 0], drawn.width[0, 0]) == tuple(
        expected
    )


def test_boxes__without_random_crop_the_largest_centerd_square() -> None:
    drawn = draw([{"crop_size": 8, "num_crops": 1, "rrc": {"enabled": False}}], 2, 30, 50)
    assert [drawn.top[0, 0], drawn.left[0, 0], drawn.height[0, 0], drawn.width[0, 0]] == [
        0,
        10,
        30,
        30,
    ]


def test_shares_and_ranges(make_pipeline: Any) -> None:
    pipeline = make_pipeline(blur=0.3, solarize=0.2, equalize=0.1, flip=0.4, gray=0.25, jitter=0.7)
    drawn = draw([pipeline], 20000, 60, 80)
    shares = {
        "flip": (drawn.flip, 0.4),
        "jitter": (drawn.jitter, 0.7),
        "gray": (drawn.gray, 0.25),
        "blur": (drawn.blur_radius > 0, 0.3),
        "solarize": (drawn.solarize, 0.2),
        "equalize": (drawn.equalize, 0.1),
    }
    for name, (happened, probability) in shares.items():
        assert happened.mean() == pytest.approx(probability, abs=0.015), name
    factors = drawn.factors[drawn.jitter]
    for axis, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert stats.kstest(factors[:, axis], stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert (drawn.factors[~drawn.jitter] == [1.0, 1.0, 1.0, 0.0]).all()
    radius = drawn.blur_radius[drawn.blur_radius > 0]
    assert stats.kstest(radius, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    orders, counts = np.unique(drawn.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_are_independent(make_pipeline: Any) -> None:
    drawn = draw([make_pipeline(count=2, blur=0.5)], 20000, 60, 80)
    events = np.stack(
        [drawn.flip, drawn.jitter, drawn.gray, drawn.blur_radius > 0], axis=-1
    ).reshape(-1, 8)
    off_diagonal = np.corrcoef(events.T) - np.eye(8)
    assert np.abs(off_diagonal).max() < 0.03
