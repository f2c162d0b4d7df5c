"""Multi-crop transform for PIL images (the torchvision backend)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dinovmf_plugin.data.decoding import to_rgb
from dinovmf_plugin.data.parameters import UNIFORMS_PER_CROP, CropParameters, draw_parameters
from dinovmf_plugin.data.recipe import SOLARIZATION_THRESHOLD, Crop, Recipe, parse_recipe
from dinovmf_plugin.data.sampling import sample_uniforms

_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
INTERPOLATION_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def make_crop(
    image: Image.Image, crop: Crop, parameters: CropParameters, at: tuple[int, ...]
) -> torch.Tensor:
    """Make one crop of an RGB image.

    Args:
        image: PIL image in mode RGB.
        crop: what kind of crop.
        parameters: drawn parameters.
        at: which entry of them.

    Returns:
        ``(3, size, size)`` float32, normalized.
    """
    p = parameters
    box = [int(side[at]) for side in (p.top, p.left, p.height, p.width)]
    size = [crop.size, crop.size]
    picture = F.resized_crop(
        image, *box, size=size, interpolation=INTERPOLATION_MODES[crop.interpolation]
    )
    if p.flip[at]:
        picture = F.hflip(picture)
    if p.jitter[at]:
        for operation in p.order[at]:
            picture = _JITTER[operation](picture, float(p.factors[at][operation]))
    if p.gray[at]:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    if p.blur_radius[at] > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(radius=float(p.blur_radius[at])))
    if p.solarize[at]:
        picture = ImageOps.solarize(picture, threshold=SOLARIZATION_THRESHOLD)
    if p.equalize[at]:
        picture = ImageOps.equalize(picture)
    return F.normalize(F.to_tensor(picture), crop.mean, crop.std, inplace=True)


class MultiCropTransform:
    """Callable: PIL image -> list of crops, all from the one decoded picture.

    Args:
        recipe: the crops, in order.

    Attributes:
        recipe: as given.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def num_uniforms(self) -> int:
        """Random numbers needed per image."""
        return len(self.recipe) * UNIFORMS_PER_CROP

    def parameters(
        self, image: Image.Image, *, seed: int, epoch: int, index: int
    ) -> CropParameters:
        """Parameters ``(1, N)`` of the crops of one image, a pure function of the arguments."""
        uniforms = sample_uniforms(seed, epoch, index, self.num_uniforms)
        return draw_parameters(
            self.recipe,
            uniforms.reshape(1, len(self.recipe), UNIFORMS_PER_CROP),
            np.array([image.height]),
            np.array([image.width]),
        )

    def __call__(
        self, image: Image.Image, *, seed: int | None = None, epoch: int = 0, index: int = 0
    ) -> list[torch.Tensor]:
        """Make all crops of an image.

        Args:
            image: any PIL image; it is converted by ``decoding.to_rgb``.
            seed: the run's seed; None draws one from Python's ``random`` (as a plain torchvision
                transform would).
            epoch: epoch of the run.
            index: the image's index in the data set.

        Returns:
            N tensors ``(3, size, size)``, float32, normalized.
        """
        if seed is None:
            seed = random.getrandbits(63)
        image = to_rgb(image)
        drawn = self.parameters(image, seed=seed, epoch=epoch, index=index)
        return [make_crop(image, crop, drawn, (0, n)) for n, crop in enumerate(self.recipe)]


def build_transform(
    augmentations: Sequence[Mapping[str, Any]], *, dataset: str | None = None
) -> MultiCropTransform:
    """Build the multi-crop transform of a config's ``augmentations`` list.

    Args:
        augmentations: solo-learn's list of pipelines, see
            :func:`dinovmf_plugin.data.recipe.parse_recipe`.
        dataset: the config's ``data.dataset``, for mean and standard deviation.

    Returns:
        The transform.

    Raises:
        ValueError: a key is unknown or missing or a value is out of range.

    Example:
        >>> from PIL import Image
        >>> transform = build_transform([{"crop_size": 8, "num_crops": 2, "rrc": {"enabled": False}}])
        >>> [tuple(crop.shape) for crop in transform(Image.new("RGB", (12, 9)))]
        [(3, 8, 8), (3, 8, 8)]
    """
    return MultiCropTransform(parse_recipe(augmentations, dataset=dataset))
