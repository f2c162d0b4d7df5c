"""Long pictures: torchvision's own values, and no more pixels than the crop needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.long_pictures import resized_center


def _picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 10007 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 400),
        (400, 1),
        (3, 500),
        (500, 7),
        (64, 640),
        (97, 1013),
        (700, 61),
        (1013, 97),
        (40, 200),
        (900, 33),
    ],
)
def test_resized_center__equals_torchvision_to_the_bit(height, width, interpolation):
    picture = _picture(height, width)
    transform = CenterCrop(32, 28, interpolation)
    plain = F.resize(picture, [32], interpolation=InterpolationMode(interpolation))
    expected = F.center_crop(plain, [28, 28])
    found = resized_center(picture, *transform.resized(height, width), 28, interpolation)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    tensor = F.normalize(F.to_tensor(expected), transform.mean, transform.std)
    assert torch.equal(transform(picture), tensor)


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (2, 20000), (300, 9000)])
def test_center_crop__long_picture__makes_few_pixels(height, width, monkeypatch):
    """1 x 5000 pixels became 256 x 1,280,000: 1.3 GiB."""
    made, resize = [], Image.Image.resize

    def counted(self, size, *args, **kwargs):
        made.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counted)
    result = CenterCrop()(_picture(height, width))
    assert result.shape == (3, 224, 224)
    assert 0 < sum(made) <= 256 * 400
