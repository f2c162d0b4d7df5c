"""Hugging Face data sets as streams (``data.source=hfids``).

Differs from upstream: timm's ``ReaderHfids`` gives each worker whole shards and repeats or drops images where
they are uneven, needs labels, and cannot go on in the middle of an epoch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.sampling import EpochPlan
from dinovmf_plugin.data.source import NO_LABEL, Source
from dinovmf_plugin.data.sources.hf import (
    columns_of,
    index_column,
    load_hub,
    no_labels,
    row_content,
)
from dinovmf_plugin.data.unreadable import CHECKS, problem_of

__all__ = ["HubStream", "Sample", "list_stream", "stream_classes"]

_SHUFFLED = 4096
"""Images among which a stream draws the next one."""


class Sample(NamedTuple):
    """An image of a stream.

    Attributes:
        number: how many images of the epoch came before it, of all processes.
        data: its file.
        label: class, or -1.
    """

    number: int
    data: bytes
    label: int


@dataclass(frozen=True)
class HubStream(Source):
    """A data set that is read from its beginning, in an order that hardly seeks.

    Every process reads the whole stream and keeps its share, so that shares are disjoint and cover all
    images. An epoch that is resumed is read again up to where it stopped.

    Attributes:
        root: the data set.
        data: the stream, undecoded.
        convert: cell of the label column -> class.
        column: of the images.
        labels: ``(N,)`` int64, in the order on disk.
        classes: class names.
    """

    root: Path
    data: Any
    convert: Callable[[Any], int]
    column: str
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def listing(self) -> bytes:
        """What all processes must have in common."""
        return self.labels.tobytes()

    def path(self, item: Sample) -> str:
        """The data set and the number of the image in the epoch."""
        return f"{self.root}/image {item.number} of the epoch"

    def read(self, item: Sample) -> bytes:
        """The content of an image."""
        return item.data

    def label(self, item: Sample) -> int:
        """Its class, or -1."""
        return item.label

    def index(self, item: Sample) -> int:
        """Its number in the epoch."""
        return item.number

    def _samples(self, seed: int, epoch: int) -> Iterator[Sample]:
        drawn = self.data.shuffle(seed=seed, buffer_size=_SHUFFLED)
        drawn.set_epoch(epoch)
        for number, row in enumerate(drawn):
            yield Sample(number, row_content(row[self.column]), self.convert(row))

    def batches(self, plan: EpochPlan, epoch: int, start: int) -> Iterator[list[Sample]]:
        """This rank's batches ``start .. plan.steps - 1`` of an epoch."""
        share = itertools.islice(self._samples(plan.seed, epoch), plan.rank, None, plan.world_size)
        share = itertools.islice(share, start * plan.batch_size, plan.steps * plan.batch_size)
        for _ in range(start, plan.steps):
            batch = list(itertools.islice(share, plan.batch_size))
            if len(batch) < plan.batch_size:
                raise UnreadableImageError(
                    f"{str(self.root)!r} has fewer images than when it was listed"
                )
            yield batch


def _open_stream(
    path: str | os.PathLike[str],
    key: str,
    split: str | None,
    image_key: str | None,
    label_key: str | None,
) -> tuple[Path, Any, str, str | None]:
    path = Path(path)
    data, _ = load_hub(path, split, key, streaming=True)
    import datasets

    if isinstance(data, datasets.Dataset):  # what save_to_disk wrote
        data = data.to_iterable_dataset()
    if data.features is None:
        data = data.resolve_features()
    image, label = columns_of(data, path, key, image_key, label_key)
    return path, data.cast_column(image, datasets.Image(decode=False)), image, label


def list_stream(
    path: str | os.PathLike[str],
    *,
    labeled: bool = True,
    key: str = "data.train_path",
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    check: str = "none",
    rank: int = 0,
    world_size: int = 1,
) -> HubStream:
    """Read a stream once: count its images, collect their labels, find what is unreadable.

    Args:
        path: as for :func:`list_hub`.
        labeled: as for :func:`list_hub`.
        key: as for :func:`list_hub`.
        split: as for :func:`list_hub`.
        image_key: as for :func:`list_hub`.
        label_key: as for :func:`list_hub`.
        check: as for ``unreadable.find_unreadable``; with ``none`` the images themselves are not read.
        rank: this process; it checks every ``world_size``-th image.
        world_size: number of processes that check together.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`list_hub`.
        UnreadableImageError: an image cannot be read.
    """
    if check not in CHECKS:
        raise ValueError(f"data.check_images must be one of {CHECKS}, got {check!r}")
    path, data, image, label = _open_stream(path, key, split, image_key, label_key)
    if labeled and label is None:
        raise no_labels(path, key)
    wanted = [label] if labeled and label is not None else []
    read = data.select_columns([*wanted, image] if check != "none" or not wanted else wanted)
    stream = HubStream(path, read, lambda row: NO_LABEL, image, np.zeros(0, np.int64), ())
    values, bad = [], []
    for number, row in enumerate(read):
        values.append(row[label] if wanted else None)
        if check == "none" or number % world_size != rank:
            continue
        try:
            problem = problem_of(stream, Sample(number, row_content(row[image]), NO_LABEL), check)
        except (OSError, ValueError) as error:
            problem = str(error)
        if problem:
            bad.append(f"row {number} ({problem})")
    if not values:
        raise ValueError(f"{key}: there are no images in {str(path)!r}")
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UnreadableImageError(
            f"{key}: {len(bad)} of {len(values)} images of {str(path)!r} cannot be read: "
            f"{'; '.join(bad[:10])}{more}. Repair them, or set data.source=hfds, which can leave them out"
        )
    data = data.select_columns([*wanted, image])
    if not wanted or label is None:
        none = np.full(len(values), NO_LABEL, dtype=np.int64)
        return HubStream(path, data, _unlabeled, image, none, ())
    labels, classes = index_column(data, values, label, f"{key}={path}")
    if not classes:
        raise no_labels(path, key)
    return HubStream(path, data, _Labels(label, classes), image, labels, classes)


def stream_classes(
    path: str | os.PathLike[str],
    key: str,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> tuple[str, ...]:
    """Class names of a stream, from its features where they tell, else from all labels."""
    found, data, _, label = _open_stream(path, key, split, image_key, label_key)
    if label is None:
        raise no_labels(found, key)
    names = getattr(data.features[label], "names", None)
    if names is not None:
        return tuple(names)
    listed = list_stream(path, key=key, split=split, image_key=image_key, label_key=label_key)
    return listed.classes


def _unlabeled(row: Any) -> int:
    return NO_LABEL


@dataclass(frozen=True)
class _Labels:
    column: str
    classes: tuple[str, ...]

    def __call__(self, row: Any) -> int:
        value = row[self.column]
        if isinstance(value, str):
            return self.classes.index(value)
        return NO_LABEL if value is None else max(int(value), NO_LABEL)
