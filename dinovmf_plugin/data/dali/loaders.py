"""Loaders on NVIDIA DALI, on the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dinovmf_plugin.data.dali.feed import (
    EncodedReader,
    Feed,
    Inputs,
    Items,
    center_inputs,
    crop_inputs,
)
from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.recipe import Recipe
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.data.source import Listing, Source
from dinovmf_plugin.data.unreadable import problem_of

try:
    from dinovmf_plugin.data.dali.pipeline import (
        DEVICES,
        center_crop_pipeline,
        crop_pipeline,
        decoding_pipeline,
    )
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "DALI is not installed: `pip install 'dinovmf-plugin[dali]'` (CUDA 12: [dali-cuda12]), "
        "or set data.format=image_folder"
    ) from error


def _resolve_device(device: str, device_id: int | None) -> tuple[int | None, torch.device]:
    if device not in DEVICES:
        raise ValueError(f"dali.device must be one of {DEVICES}, got {device!r}")
    if device == "cpu":
        return None, torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "dali.device=gpu needs a CUDA device and there is none: set dali.device=cpu"
        )
    index = torch.cuda.current_device() if device_id is None else device_id
    return index, torch.device("cuda", index)


class _Runner:
    """Runs a pipeline epoch after epoch; names the file when an image cannot be decoded."""

    def __init__(
        self,
        images: Source,
        inputs: Callable[[Any, int], Inputs],
        build: Callable[..., Any],
        *,
        batch_size: int,
        device: str,
        device_id: int | None,
        num_threads: int,
    ) -> None:
        self.device_id, self.device = _resolve_device(device, device_id)
        self.images = images
        self._feed = Feed(inputs, EncodedReader(images, num_threads=num_threads))
        self._running = False
        self._pipeline = build(
            self._feed,
            device=device,
            batch_size=batch_size,
            num_threads=max(1, num_threads),
            device_id=self.device_id,
        )
        self._pipeline.build()

    def run(self, order: Iterator[Items], epoch: int) -> Iterator[tuple[Items, list[torch.Tensor]]]:
        """Yield items and outputs of each batch."""
        self._drain()
        self._feed.start(order, epoch)
        self._running = True
        while True:
            try:
                outputs = self._outputs()
            except StopIteration:
                break
            yield self._feed.in_flight.popleft(), outputs
        self._finish()

    def _outputs(self) -> list[torch.Tensor]:
        stream = torch.cuda.current_stream(self.device) if self.device_id is not None else None
        try:
            outputs = self._pipeline.run(stream)
        except RuntimeError as error:
            self._running = False
            raise self._named(error) from error
        # No copy: the tensors keep DALI's buffers alive, and DALI writes each batch to new ones.
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _named(self, error: RuntimeError) -> RuntimeError:
        """The error, with the name of the file that caused it where there is one."""
        if isinstance(error, UnreadableImageError):
            return error
        items = [item for batch in self._feed.in_flight for item in batch]
        bad = {item: problem for item in items if (problem := problem_of(self.images, item))}
        if not bad:  # whole for PIL: ask DALI itself, file by file
            bad = {item: "DALI cannot decode it" for item in items if self._refuses(item)}
        if not bad:
            return error
        names = "; ".join(
            f"{self.images.path(item)!r} ({problem})" for item, problem in list(bad.items())[:10]
        )
        return UnreadableImageError(
            f"cannot read the image {names}: repair or remove it, or set data.skip_unreadable=True"
        )

    def _refuses(self, item: Any) -> bool:
        encoded = [np.frombuffer(self.images.encoded(item)[0], dtype=np.uint8)]
        device = "cpu" if self.device_id is None else "gpu"
        pipeline = decoding_pipeline(lambda: encoded, device=device, device_id=self.device_id)
        try:
            pipeline.build()
            pipeline.run()
        except RuntimeError:
            return True
        return False

    def _drain(self) -> None:
        """Empties the pipeline after an epoch that was left early."""
        if not self._running:
            return
        self._feed.stop()
        while True:
            try:
                self._pipeline.run()
            except StopIteration:
                break
        self._finish()

    def _finish(self) -> None:
        self._pipeline.reset()
        self._running = False


class DALILoader(ResumableLoader):
    """Training batches of all crops, computed by DALI.

    Yields ``[indexes (B,) int64, [crops (B, 3, size, size) float32, ...], targets (B,) int64]`` on
    the loader's device. The order of the images and the parameters of the crops are those of
    :class:`dinovmf_plugin.data.loaders.PretrainLoader` with the same seed. The indexes are always
    the true ones.

    Args:
        images: where they come from.
        recipe: the crops.
        plan: batches of this rank.
        device: ``cpu`` (works without CUDA) or ``gpu``.
        device_id: index of the GPU; the current one by default.
        num_threads: threads that decode and augment.

    Raises:
        ValueError: unknown device, or ``gpu`` without CUDA.
        UnreadableImageError: while iterating, an image cannot be read; the message names it.

    Differs from upstream:
        solo-learn's DALI loader always draws from seed 12 plus the local rank and starts again from
        there when a run is resumed, invents indexes unless told to encode them into labels, and
        needs CUDA also for ``cpu``.
    """

    def __init__(
        self,
        images: Source,
        recipe: Recipe,
        plan: EpochPlan,
        *,
        device: str = "gpu",
        device_id: int | None = None,
        num_threads: int = 4,
    ) -> None:
        super().__init__(plan)
        self.recipe = recipe
        self._images = images
        self._runner = _Runner(
            images,
            lambda batch, epoch: crop_inputs(batch, recipe, seed=plan.seed, epoch=epoch),
            lambda source, **kwargs: crop_pipeline(source, recipe, **kwargs),
            batch_size=plan.batch_size,
            device=device,
            device_id=device_id,
            num_threads=num_threads,
        )

    def _batches(self, epoch: int, start: int) -> Iterator[list[Any]]:
        device = self._runner.device
        order = self._images.batches(self.plan, epoch, start)
        for items, crops in self._runner.run(order, epoch):
            indexes = torch.tensor([self._images.index(item) for item in items], device=device)
            targets = torch.tensor([self._images.label(item) for item in items], device=device)
            yield [indexes, crops, targets]


class DALIEvaluationLoader:
    """All images once, in order, resized, center-cropped and normalized by DALI.

    Yields ``(images (B, 3, size, size) float32, targets (B,) int64)``; the last batch is as small
    as it is.

    Args:
        images: where they come from.
        transform: by default Resize 256 bicubic, center crop 224, ImageNet statistics.
        batch_size: images per batch.
        device: ``cpu`` or ``gpu``.
        device_id: index of the GPU; the current one by default.
        num_threads: threads that decode.
    """

    def __init__(
        self,
        images: Listing,
        *,
        transform: CenterCrop | None = None,
        batch_size: int = 64,
        device: str = "gpu",
        device_id: int | None = None,
        num_threads: int = 4,
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        chosen = transform or CenterCrop()
        self._runner = _Runner(
            images,
            lambda batch, epoch: center_inputs(batch, chosen),
            lambda source, **kwargs: center_crop_pipeline(source, chosen, **kwargs),
            batch_size=batch_size,
            device=device,
            device_id=device_id,
            num_threads=num_threads,
        )

    def __len__(self) -> int:
        """Batches, the incomplete one included."""
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches in order."""
        indices = range(len(self._images))
        order = (
            indices[i : i + self._batch_size] for i in range(0, len(indices), self._batch_size)
        )
        for batch, (images,) in self._runner.run(order, 0):
            labels = self._images.labels[list(batch)]
            yield images, torch.from_numpy(labels).to(self._runner.device)
