"""What goes into a DALI pipeline: encoded images and the numbers that describe their crops.

The order of the images and all random numbers are drawn here, as functions of (seed, epoch, index),
and DALI computes pixels only. That is what makes a resumed run exact; DALI's own readers and random
operators keep a state that cannot be set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.dali.color import color_matrices
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.parameters import UNIFORMS_PER_CROP, draw_parameters
from dinovmf_plugin.data.recipe import Crop, Recipe
from dinovmf_plugin.data.sampling import sample_uniforms
from dinovmf_plugin.data.source import Source

Items = Sequence[Any]
"""What a source knows the images of a batch by."""


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded images of a batch.

    Attributes:
        items: B items of the source.
        indices: their numbers, ``(B,)`` int64.
        encoded: B uint8 arrays, the files, see ``decoding.decodable``.
        heights: ``(B,)`` int64 pixels, from the headers.
        widths: ``(B,)`` int64 pixels.
    """

    items: Items
    indices: npt.NDArray[np.int64]
    encoded: list[npt.NDArray[np.uint8]]
    heights: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]


class EncodedReader:
    """Reads the files of batches in threads, some batches ahead.

    Args:
        images: the source.
        num_threads: threads.
        ahead: batches that are read before they are asked for.
    """

    def __init__(self, images: Source, *, num_threads: int, ahead: int = 2) -> None:
        self.images = images
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="image-reader")

    def _read(self, item: Any) -> tuple[npt.NDArray[np.uint8], int, int]:
        data, height, width = self.images.encoded(item)
        return np.frombuffer(data, dtype=np.uint8), height, width

    def batches(self, order: Iterator[Items]) -> Iterator[EncodedBatch]:
        """Yield the batches of an epoch.

        Raises:
            RuntimeError: a file cannot be read; the message names it.
        """
        waiting: deque[tuple[Items, list[Future[Any]]]] = deque()
        for items in order:
            waiting.append((items, [self._pool.submit(self._read, item) for item in items]))
            if len(waiting) > self.ahead:
                yield self._collect(*waiting.popleft())
        while waiting:
            yield self._collect(*waiting.popleft())

    def _collect(self, items: Items, files: list[Future[Any]]) -> EncodedBatch:
        data, heights, widths = zip(*(file.result() for file in files), strict=True)
        indices = np.array([self.images.index(item) for item in items], dtype=np.int64)
        return EncodedBatch(items, indices, list(data), np.array(heights), np.array(widths))


Inputs = tuple[Any, ...]
"""Values of the pipeline's inputs for one batch: the encoded images first."""


def input_names(crop: Crop) -> tuple[str, ...]:
    """Names of the inputs that a crop's graph needs, one value per image each.

    ``start`` and ``end`` are ``(2,)`` float32, first row and column of the box and one past the
    last, swapped to mirror. ``colored``, ``blurred``, ``solarized`` and ``equalized`` are bool;
    ``pixel_matrix`` and ``mean_matrix`` are the ``(3, 3)`` float32 matrices of
    :func:`dinovmf_plugin.data.dali.color.color_matrices`; ``radius`` is the blur's standard deviation in
    pixels.

    Example:
        >>> input_names(Crop(size=96, scale=(0.05, 0.25), blur_prob=0.5))
        ('start', 'end', 'blurred', 'radius')
    """
    names = ["start", "end"]
    if crop.jitter_prob > 0 or crop.gray_prob > 0:
        names += ["colored", "pixel_matrix", "mean_matrix"]
    if crop.blur_prob > 0:
        names += ["blurred", "radius"]
    if crop.solarize_prob > 0:
        names += ["solarized"]
    if crop.equalize_prob > 0:
        names += ["equalized"]
    return tuple(names)


def crop_inputs(batch: EncodedBatch, recipe: Recipe, *, seed: int, epoch: int) -> Inputs:
    """Inputs of the training pipeline: the encoded images, then those of each crop.

    Args:
        batch: encoded images.
        recipe: the crops.
        seed: the run's seed.
        epoch: epoch.

    Returns:
        Flat tuple; per crop the values that :func:`input_names` lists.
    """
    shape = (len(batch.indices), len(recipe), UNIFORMS_PER_CROP)
    size = shape[1] * shape[2]
    uniforms = np.stack([sample_uniforms(seed, epoch, int(i), size) for i in batch.indices])
    drawn = draw_parameters(recipe, uniforms.reshape(shape), batch.heights, batch.widths)
    right, bottom = drawn.left + drawn.width, drawn.top + drawn.height
    start = np.stack([drawn.top, np.where(drawn.flip, right, drawn.left)], axis=-1)
    end = np.stack([bottom, np.where(drawn.flip, drawn.left, right)], axis=-1)
    pixel, mean = color_matrices(drawn)
    blurred = drawn.blur_radius > 0
    values = {
        "start": start.astype(np.float32),
        "end": end.astype(np.float32),
        "colored": drawn.jitter | drawn.gray,
        "pixel_matrix": pixel,
        "mean_matrix": mean,
        "blurred": blurred,
        "radius": np.where(blurred, drawn.blur_radius, 1.0).astype(np.float32),
        "solarized": drawn.solarize,
        "equalized": drawn.equalize,
    }
    per_crop = [
        np.ascontiguousarray(values[name][:, n])
        for n, crop in enumerate(recipe)
        for name in input_names(crop)
    ]
    return (batch.encoded, *per_crop)


def center_inputs(batch: EncodedBatch, transform: CenterCrop) -> Inputs:
    """Inputs of the evaluation pipeline: the images and their centered boxes in source pixels.

    Args:
        batch: encoded images.
        transform: resize and crop.

    Returns:
        Encoded images, ``(B, 2)`` and ``(B, 2)`` float32.
    """
    sizes = np.array(
        [transform.resized(h, w) for h, w in zip(batch.heights, batch.widths, strict=True)]
    )
    offset = np.rint((sizes - transform.size) / 2.0)
    scale = np.stack([batch.heights, batch.widths], axis=-1) / sizes
    start, end = offset * scale, (offset + transform.size) * scale
    return batch.encoded, start.astype(np.float32), end.astype(np.float32)


class Feed:
    """The callback of DALI's external source: one epoch, batch after batch, then StopIteration.

    Args:
        inputs: makes the pipeline's inputs of a batch and an epoch.
        reader: reads the files.
    """

    def __init__(
        self, inputs: Callable[[EncodedBatch, int], Inputs], reader: EncodedReader
    ) -> None:
        self._inputs = inputs
        self._reader = reader
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="crop-parameters")
        self._prepared: Iterator[tuple[Items, Inputs]] = iter(())
        self.in_flight: deque[Items] = deque()
        """Items of the batches handed to DALI and not yet returned by it, oldest first."""

    def start(self, order: Iterator[Items], epoch: int) -> None:
        """Begins an epoch with the given batches of items."""
        self._prepared = self._prepare(order, epoch)
        self.in_flight.clear()

    def stop(self) -> None:
        """End the epoch early: the next call raises StopIteration."""
        self._prepared = iter(())

    def _prepare(self, order: Iterator[Items], epoch: int) -> Iterator[tuple[Items, Inputs]]:
        """Yield items and inputs of each batch, made in a thread one batch ahead."""
        batches = self._reader.batches(order)

        def following() -> tuple[Items, Inputs] | None:
            batch = next(batches, None)
            return None if batch is None else (batch.items, self._inputs(batch, epoch))

        future = self._pool.submit(following)
        while (prepared := future.result()) is not None:
            future = self._pool.submit(following)
            yield prepared

    def __call__(self) -> Inputs:
        """Inputs of the next batch."""
        items, inputs = next(self._prepared)
        self.in_flight.append(items)
        return inputs
