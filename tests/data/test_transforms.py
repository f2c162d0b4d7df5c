import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as F

from dinovmf_plugin.data.transforms import MultiCropTransform, build_transform, make_crop


class Blur:
    """Gaussian blur of the DINO paper's recipe, written for this test."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def reference(size: int, scale: Any, blur: float, solarize: float) -> Any:
    """DINO's recipe out of torchvision's own random transforms."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=scale, interpolation=F.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([Blur()], p=blur),
            transforms.RandomSolarize(128, p=solarize),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def statistics(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and standard deviation per channel, roughness, and a histogram of eight bins per channel."""
    per_crop = crops.flatten(2)
    histogram = torch.stack([torch.histc(crops[:, c], 8, -2.2, 2.7) for c in range(3)])
    return {
        "mean": per_crop.mean((0, 2)),
        "spread of means": per_crop.mean(2).std(0),
        "std": per_crop.std(2).mean(0),
        "roughness": crops.diff(dim=-1).abs().mean((0, 2, 3)),
        "histogram": histogram / crops[:, 0].numel(),
    }


@pytest.mark.parametrize(
    ("blur", "solarize", "scale", "size"),
    [(0.1, 0.2, (0.25, 1.0), 24), (0.5, 0.0, (0.05, 0.25), 16)],
)
def test_distribution_of_torchvision(
    picture: Any, make_pipeline: Any, blur: float, solarize: float, scale: Any, size: int
) -> None:
    pictures = [picture(seed, 48, 64) for seed in range(6)]
    count = 100
    transform = build_transform([make_pipeline(size, count, scale, blur=blur, solarize=solarize)])
    theirs = reference(size, scale, blur, solarize)
    torch.manual_seed(0)
    random.seed(0)
    ours = torch.stack([c for i, p in enumerate(pictures) for c in transform(p, seed=0, index=i)])
    other = torch.stack([theirs(p) for p in pictures for _ in range(count)])
    found, expected = statistics(ours), statistics(other)
    tolerance = {
        "mean": 0.09,
        "spread of means": 0.07,
        "std": 0.05,
        "roughness": 0.02,
        "histogram": 0.025,
    }
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < tolerance[name], name


@pytest.mark.parametrize("operation", ["flip", "jitter", "gray", "blur", "solarize", "equalize"])
def test_every_operation_reaches_the_pixels(
    picture: Any, make_pipeline: Any, operation: str
) -> None:
    off = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0, "equalize": 0.0}
    image = picture(3, 40, 40)
    plain, changed = (
        build_transform([make_pipeline(20, **{**off, operation: share})])(image, seed=2)[0]
        for share in (0.0, 1.0)
    )
    assert (plain - changed).abs().mean() > 0.01
    if operation == "flip":
        torch.testing.assert_close(changed, plain.flip(-1))
    if operation == "gray":
        pixels = changed * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        pixels = pixels + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        torch.testing.assert_close(pixels[0], pixels[1], atol=1e-6, rtol=0)


def test_crops_in_the_order_of_the_recipe(picture: Any, multicrop: list[dict[str, Any]]) -> None:
    crops = build_transform(multicrop)(picture(0, 50, 60))
    assert [tuple(crop.shape) for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2
    assert all(crop.dtype == torch.float32 for crop in crops)


def test_function_of_seed_epoch_and_index(picture: Any, multicrop: list[dict[str, Any]]) -> None:
    transform, image = build_transform(multicrop), picture(0, 50, 60)
    crops = {
        key: transform(image, seed=key[0], epoch=key[1], index=key[2])
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    again = transform(image, seed=0, epoch=0, index=0)
    assert all(torch.equal(a, b) for a, b in zip(again, crops[0, 0, 0], strict=True))
    firsts = [value[0] for value in crops.values()]
    assert all(not torch.equal(firsts[i], firsts[j]) for i in range(4) for j in range(i))


def test_without_a_seed_it_follows_pythons_random(
    picture: Any, multicrop: list[dict[str, Any]]
) -> None:
    transform, image = build_transform(multicrop), picture(0, 50, 60)
    random.seed(1)
    first, second = transform(image), transform(image)
    random.seed(1)
    torch.testing.assert_close(transform(image), first, atol=0, rtol=0)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode(picture: Any, multicrop: list[dict[str, Any]], mode: str) -> None:
    crops = build_transform(multicrop)(picture(0, 50, 60).convert(mode), seed=0)
    assert all(torch.isfinite(crop).all() for crop in crops)


def test_make_crop__bilinear_crop_of_torchvision(picture: Any, make_pipeline: Any) -> None:
    pipeline = make_pipeline(20, jitter=0.0, gray=0.0, flip=0.0)
    pipeline["rrc"]["interpolation"] = "bilinear"
    transform = MultiCropTransform(build_transform([pipeline]).recipe)
    image = picture(1, 50, 60)
    drawn = transform.parameters(image, seed=0, epoch=0, index=0)
    box = [int(value[0, 0]) for value in (drawn.top, drawn.left, drawn.height, drawn.width)]
    expected = F.to_tensor(F.resized_crop(image, *box, [20, 20], F.InterpolationMode.BILINEAR))
    expected = F.normalize(expected, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(make_crop(image, transform.recipe[0], drawn, (0, 0)), expected)
    assert np.prod(box[2:]) < 50 * 60
