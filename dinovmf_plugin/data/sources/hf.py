"""Hugging Face data sets on disk: by row (``data.source=hfds``), or as a stream (``data.source=hfids``).

Differs from upstream: timm's ``ReaderHfds`` and ``ReaderHfids`` give the same images and labels; they do not
read what ``save_to_disk`` writes, need labels, and download what is not there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.sampling import EpochPlan
from dinovmf_plugin.data.source import NO_LABEL, Listing, Source
from dinovmf_plugin.data.sources.labels import NoLabelsError, index_labels
from dinovmf_plugin.data.unreadable import CHECKS, problem_of

__all__ = ["HubImages", "HubStream", "Sample", "list_hub", "list_stream", "stream_classes"]

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_SHUFFLED = 4096
"""Images among which a stream draws the next one."""


def _load(path: Path, split: str | None, key: str, streaming: bool) -> tuple[Any, str]:
    source = "hfids" if streaming else "hfds"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data.source={source} needs Hugging Face's datasets, which is not installed: "
            'pip install "dinovmf-plugin[sources]"'
        ) from error
    if not path.exists():
        raise FileNotFoundError(
            f"{key}: {str(path)!r} does not exist: data.source={source} needs a local path, nothing is "
            "downloaded"
        )
    options: dict[str, Any] = {
        "streaming": streaming,
        "download_config": datasets.DownloadConfig(local_files_only=True),
    }
    try:
        if (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path), **options)
        elif path.suffix in _BUILDERS:
            found = datasets.load_dataset(
                _BUILDERS[path.suffix], data_files=str(path), split="train", **options
            )
        else:
            raise ValueError(f"it is no folder, {' or '.join(_BUILDERS)} file")
    except Exception as error:  # the library raises its own, pyarrow's and fsspec's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{key}: {str(path)!r} is no Hugging Face data set on disk: {reason}"
        ) from error
    if not isinstance(found, dict):
        return found, split or "train"
    usual = "train" if key.endswith("train_path") else "validation"
    chosen = split or (usual if len(found) > 1 else next(iter(found)))
    if chosen not in found:
        name = "train_split" if key.endswith("train_path") else "val_split"
        raise ValueError(
            f"{key}: {str(path)!r} has no split {chosen!r}: set data.{name} to one of {', '.join(found)}"
        )
    return found[chosen], chosen


def _columns(
    data: Any, path: Path, key: str, image_key: str | None, label_key: str | None
) -> tuple[str, str | None]:
    """Names of the columns of images and labels."""
    import datasets

    features = data.features or {}
    kinds = {name: type(feature) for name, feature in features.items()}
    pictures = [name for name, kind in kinds.items() if kind is datasets.Image]
    image = image_key or next(iter(pictures), "")
    if image not in kinds:
        raise ValueError(
            f"{key}: {str(path)!r} has no column of images{f' {image!r}' if image else ''}: set "
            f"data.image_key to one of {', '.join(kinds)}"
        )
    if label_key is not None and label_key not in kinds:
        raise ValueError(
            f"{key}: {str(path)!r} has no column {label_key!r}: set data.label_key to one of "
            f"{', '.join(kinds)}"
        )
    named = [name for name, kind in kinds.items() if kind is datasets.ClassLabel]
    return image, label_key or ("label" if "label" in kinds else next(iter(named), None))


def _index(data: Any, values: Sequence[Any], label: str, where: str) -> tuple[Any, tuple[str, ...]]:
    names = getattr(data.features[label], "names", None)
    indices, found = index_labels(values, where)
    return indices, tuple(names) if names is not None else found


def _no_labels(path: Path, key: str) -> NoLabelsError:
    return NoLabelsError(
        f"{key}: {str(path)!r} has no column of labels: name it with data.label_key, or set "
        "data.no_labels=True"
    )


def _content(cell: Any) -> bytes:
    """The image file of a cell of an undecoded image column."""
    if cell is None:
        raise ValueError("the row has no image")
    data = cell["bytes"]
    return data if data is not None else Path(cell["path"]).read_bytes()


@dataclass(frozen=True)
class HubImages(Listing):
    """Rows of a data set in Arrow files.

    Attributes:
        data: the data set's column of undecoded images.
        rows: ``(N,)`` int64.
    """

    data: Any
    rows: npt.NDArray[np.int64]

    columns: ClassVar[tuple[str, ...]] = ("names", "labels", "rows")

    def read(self, index: int) -> bytes:
        """The content of image ``index``."""
        (cell,) = self.data[int(self.rows[index])].values()
        return _content(cell)

    def files(self) -> Iterator[str]:
        """The Arrow files."""
        for file in self.data.cache_files:
            yield file["filename"]


def list_hub(
    path: str | os.PathLike[str],
    *,
    labeled: bool = True,
    key: str = "data.train_path",
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> HubImages:
    """List the rows of a data set on disk, in their order.

    Args:
        path: what ``save_to_disk`` wrote, a folder that ``datasets.load_dataset`` takes (Parquet, Arrow,
            image folder ...), or one Parquet or Arrow file.
        labeled: whether to read the labels.
        key: config key of the path, for messages.
        split: by default the only one, or else ``train`` and ``validation``.
        image_key: column of the images; by default the first of that type.
        label_key: column of the labels; by default ``label``, or the first of that type.

    Raises:
        FileNotFoundError: there is no such path; nothing is downloaded.
        ValueError: it is no data set, or lacks the split, a column or images.
        ImportError: datasets is not installed.
    """
    path = Path(path)
    data, split = _load(path, split, key, streaming=False)
    image, label = _columns(data, path, key, image_key, label_key)
    import datasets

    count = len(data)
    if not count:
        raise ValueError(f"{key}: there are no images in {str(path)!r}")
    labels = np.full(count, NO_LABEL, dtype=np.int64)
    classes: tuple[str, ...] = ()
    if labeled:
        if label is None:
            raise _no_labels(path, key)
        values = data.select_columns([label])[:][label]
        labels, classes = _index(data, values, label, f"{key}={path}")
        if not classes:
            raise _no_labels(path, key)
    names = np.array([f"{split}/{row}".encode() for row in range(count)], dtype=np.bytes_)
    cells = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HubImages(path, names, labels, classes, cells, np.arange(count))


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
            yield Sample(number, _content(row[self.column]), self.convert(row))

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
    data, _ = _load(path, split, key, streaming=True)
    import datasets

    if isinstance(data, datasets.Dataset):  # what save_to_disk wrote
        data = data.to_iterable_dataset()
    if data.features is None:
        data = data.resolve_features()
    image, label = _columns(data, path, key, image_key, label_key)
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
        raise _no_labels(path, key)
    wanted = [label] if labeled and label is not None else []
    read = data.select_columns([*wanted, image] if check != "none" or not wanted else wanted)
    stream = HubStream(path, read, lambda row: NO_LABEL, image, np.zeros(0, np.int64), ())
    values, bad = [], []
    for number, row in enumerate(read):
        values.append(row[label] if wanted else None)
        if check == "none" or number % world_size != rank:
            continue
        try:
            problem = problem_of(stream, Sample(number, _content(row[image]), NO_LABEL), check)
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
    labels, classes = _index(data, values, label, f"{key}={path}")
    if not classes:
        raise _no_labels(path, key)
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
        raise _no_labels(found, key)
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
