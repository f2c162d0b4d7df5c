"""Hugging Face data sets on disk, by row (``data.source=hfds``).

Differs from upstream: timm's ``ReaderHfds`` gives the same images and labels; it does not read what
``save_to_disk`` writes, needs labels, and downloads what is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.source import NO_LABEL, Listing
from dinovmf_plugin.data.sources.labels import NoLabelsError, index_labels

__all__ = [
    "HubImages",
    "columns_of",
    "index_column",
    "list_hub",
    "load_hub",
    "no_labels",
    "row_content",
]

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def load_hub(path: Path, split: str | None, key: str, streaming: bool) -> tuple[Any, str]:
    """Open a data set on disk; what it is and the name of the split.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`list_hub`.
    """
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
    usual = "validation" if key == "data.val_path" else "train"
    chosen = split or (usual if len(found) > 1 else next(iter(found)))
    if chosen not in found:
        name = "val_split" if key == "data.val_path" else "train_split"
        raise ValueError(
            f"{key}: {str(path)!r} has no split {chosen!r}: set data.{name} to one of {', '.join(found)}"
        )
    return found[chosen], chosen


def columns_of(
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


def index_column(
    data: Any, values: Sequence[Any], label: str, where: str
) -> tuple[Any, tuple[str, ...]]:
    """Class indices and names of a column's values; names of its feature where it has some."""
    names = getattr(data.features[label], "names", None)
    indices, found = index_labels(values, where)
    return indices, tuple(names) if names is not None else found


def no_labels(path: Path, key: str) -> NoLabelsError:
    """The error for a data set without labels."""
    return NoLabelsError(
        f"{key}: {str(path)!r} has no column of labels: name it with data.label_key, or set "
        "data.no_labels=True"
    )


def row_content(cell: Any) -> bytes:
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
        return row_content(cell)

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
    data, split = load_hub(path, split, key, streaming=False)
    image, label = columns_of(data, path, key, image_key, label_key)
    import datasets

    count = len(data)
    if not count:
        raise ValueError(f"{key}: there are no images in {str(path)!r}")
    labels = np.full(count, NO_LABEL, dtype=np.int64)
    classes: tuple[str, ...] = ()
    if labeled:
        if label is None:
            raise no_labels(path, key)
        values = data.select_columns([label])[:][label]
        labels, classes = index_column(data, values, label, f"{key}={path}")
        if not classes:
            raise no_labels(path, key)
    names = np.array([f"{split}/{row}".encode() for row in range(count)], dtype=np.bytes_)
    cells = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HubImages(path, names, labels, classes, cells, np.arange(count))
