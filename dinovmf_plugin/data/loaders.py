"""Loaders on torchvision and PyTorch's DataLoader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinovmf_plugin.data.folders import ImageFolder
from dinovmf_plugin.data.images import UnreadableImageError, open_image
from dinovmf_plugin.data.recipe import Recipe
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.data.transforms import MultiCropTransform


class ImageSource(Protocol):
    """Images by index, with their labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""

    def label(self, index: int) -> int:
        """Its class, or -1."""


def worker_start_method(num_workers: int) -> str | None:
    """How worker processes start: not by forking once DALI's threads run, which can deadlock them.

    Example:
        >>> worker_start_method(0) is None
        True
    """
    return "forkserver" if num_workers > 0 and "nvidia.dali" in sys.modules else None


class FolderSource:
    """The images of a folder as an :class:`ImageSource`."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Reads image ``index``; an unreadable one raises an error with its name."""
        return open_image(self.images.path(index))

    def label(self, index: int) -> int:
        """Class of image ``index``, or -1."""
        return int(self.images.labels[index])


class _CropDataset(Dataset[Any]):
    """Maps (epoch, index) to one training sample; holds no state that changes."""

    def __init__(self, source: ImageSource, recipe: Recipe, seed: int) -> None:
        self.source = source
        self.transform = MultiCropTransform(recipe)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, list[torch.Tensor], int]:
        epoch, index = key
        crops = self.transform(self.source.image(index), seed=self.seed, epoch=epoch, index=index)
        return index, crops, self.source.label(index)


class _EpochBatches:
    """Batch sampler over (epoch, index) pairs.

    The epoch travels with every index because persistent workers keep the copy of the data set that
    they were started with.
    """

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.plan.indices(self.epoch)[self.start :]:
            yield [(self.epoch, int(index)) for index in batch]


class PretrainLoader(ResumableLoader):
    """Training batches of all crops, computed by torchvision in worker processes.

    Yields ``[indexes (B,) int64, [crops (B, 3, size, size) float32, ...], targets (B,) int64]``,
    the batch format of solo-learn. Order and crops are a function of (seed, epoch, index): the same
    for any number of workers.

    Args:
        source: images and labels.
        recipe: the crops.
        plan: batches of this rank.
        num_workers: worker processes; 0 works in the main process.
        pin_memory: pin the batches for the copy to a GPU; by default where there is one.
        prefetch_factor: batches that each worker prepares ahead.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        plan: EpochPlan,
        *,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__(plan)
        self._order = _EpochBatches(plan)
        self._loader = DataLoader(
            _CropDataset(source, recipe, plan.seed),
            batch_sampler=self._order,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            persistent_workers=num_workers > 0,
            multiprocessing_context=worker_start_method(num_workers),
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            # PyTorch draws seeds for the workers; not from the stream that initialises the model.
            generator=torch.Generator(),
        )

    def _batches(self, epoch: int, start: int) -> Iterator[list[Any]]:
        self._order.epoch, self._order.start = epoch, start
        try:
            yield from self._loader
        except UnreadableImageError as error:
            # PyTorch puts a worker's whole traceback into the message.
            sentence = str(error).rsplit(f"{UnreadableImageError.__name__}: ", 1)[-1].strip()
            raise UnreadableImageError(sentence) from error
