"""Deterministic loader for validation and feature extraction: resize, center crop, normalize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from dinovmf_plugin.data.loaders import leave_signals_to_the_parent, worker_start_method
from dinovmf_plugin.data.long_pictures import resized_center
from dinovmf_plugin.data.recipe import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS
from dinovmf_plugin.data.source import ImageSource
from dinovmf_plugin.data.transforms import INTERPOLATION_MODES

_LONG = 4
"""Ratio of the sides from which a picture is not resized as a whole."""


@dataclass(frozen=True)
class CenterCrop:
    """Resize of the shorter side, then a centered square: the evaluation transform of DINO.

    Attributes:
        resize: length of the shorter side after resizing, in pixels.
        size: side of the centered square, at most ``resize``.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
        mean: per-channel mean.
        std: per-channel standard deviation.

    Raises:
        ValueError: ``size`` exceeds ``resize``, or an unknown interpolation.
    """

    resize: int = 256
    size: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(
                f"the crop size must be from 1 to the resize of {self.resize}, got {self.size}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing (torchvision's rounding)."""
        longer = int(self.resize * max(height, width) / min(height, width))
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB picture -> ``(3, size, size)`` float32."""
        height, width = self.resized(image.height, image.width)
        if max(height, width) > _LONG * self.resize and image.mode == "RGB":
            picture = resized_center(image, height, width, self.size, self.interpolation)
        else:
            picture = F.resize(
                image, [self.resize], interpolation=INTERPOLATION_MODES[self.interpolation]
            )
            picture = F.center_crop(picture, [self.size, self.size])
        return F.normalize(F.to_tensor(picture), self.mean, self.std, inplace=True)


class _EvaluationDataset(Dataset[Any]):
    def __init__(self, source: ImageSource, transform: CenterCrop) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.source.image(index)), self.source.label(index)


def evaluation_loader(
    source: ImageSource,
    *,
    transform: CenterCrop | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
) -> DataLoader[Any]:
    """Loader over all images once, in order, the last batch as small as it is.

    Args:
        source: images and labels.
        transform: by default Resize 256 bicubic, center crop 224, ImageNet statistics.
        batch_size: images per batch.
        num_workers: worker processes.

    Returns:
        A DataLoader of ``(images (B, 3, size, size) float32, targets (B,) int64)``.
    """
    return DataLoader(
        _EvaluationDataset(source, transform or CenterCrop()),
        batch_size=batch_size,
        num_workers=num_workers,
        multiprocessing_context=worker_start_method(num_workers),
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
    )
