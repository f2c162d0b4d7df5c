"""Small data sets as torchvision unpacks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinovmf_plugin.data.folders import take_fraction
from dinovmf_plugin.data.source import ImageSource

__all__ = ["TorchvisionSource"]


class TorchvisionSource(ImageSource):
    """CIFAR-10, CIFAR-100 or STL-10 as an ``ImageSource``.

    Args:
        name: ``cifar10``, ``cifar100`` or ``stl10``.
        root: folder with the data set as torchvision unpacks it; nothing is downloaded.
        train: training part (STL-10: with its unlabeled images) or test part.
        fraction: share of the images, see :func:`dinovmf_plugin.data.folders.take_fraction`.

    Raises:
        FileNotFoundError: the data set is not there.
    """

    def __init__(
        self, name: str, root: str | Path, *, train: bool = True, fraction: float | None = None
    ) -> None:
        from torchvision import datasets

        try:
            if name == "stl10":
                split = "train+unlabeled" if train else "test"
                self._dataset: Any = datasets.STL10(str(root), split=split, download=False)
                labels = self._dataset.labels
            else:
                kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                self._dataset = kind(str(root), train=train, download=False)
                labels = self._dataset.targets
        except RuntimeError as error:
            raise FileNotFoundError(
                f"data.dataset={name}: the data set is not in {str(root)!r}. Download it once with "
                f"torchvision.datasets.{name.upper()}({str(root)!r}, download=True)"
            ) from error
        self._labels = np.asarray(labels, dtype=np.int64)
        self._indices = take_fraction(self._labels, fraction)

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return self._dataset[self._indices[index]][0]

    def label(self, index: int) -> int:
        """Its class; -1 for STL-10's unlabeled images."""
        return int(self._labels[self._indices[index]])
