"""Images in one HDF5 file, as solo-learn's ``convert_imgfolder_to_h5.py`` writes it (``data.format=h5``).

One group per class, in it one data set of bytes per image: the image file as it was.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinovmf_plugin.data.decoding import UnreadableImageError, to_rgb
from dinovmf_plugin.data.folders import take_fraction

__all__ = ["H5Source", "h5_classes"]


def _open(path: str | os.PathLike[str], key: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "data.format=h5 needs h5py, which is not installed: pip install h5py, or set "
            "data.format=image_folder"
        ) from error
    if not Path(path).is_file():
        what = "is a folder, not an HDF5 file" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{key}: {str(path)!r} {what} (data.format=h5)")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{key}: {str(path)!r} is no HDF5 file (data.format=h5)") from error


def h5_classes(path: str | os.PathLike[str], key: str = "data.train_path") -> tuple[str, ...]:
    """Names of the classes of a file, sorted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, or has no classes.
        ImportError: h5py is not installed.
    """
    with _open(path, key) as file:
        classes = tuple(sorted(name for name, group in file.items() if hasattr(group, "keys")))
    if not classes:
        raise ValueError(f"{key}: there are no groups, one per class, in {str(path)!r}")
    return classes


class H5Source:
    """The images of a file as an :class:`dinovmf_plugin.data.loaders.ImageSource`.

    Args:
        path: the file.
        classes: names in the order of the labels, such as the training set's; None: the file's own. Those of
            them that the file lacks have no images here.
        rank: take every ``world_size``-th image, from this one on.
        world_size: number of shares.
        fraction: share of the images, see :func:`dinovmf_plugin.data.folders.take_fraction`.
        key: config key of the file, for messages.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`h5_classes`; also for classes
            that are not in ``classes``.

    Differs from upstream: no list of the images is left in the home directory, where another file of the same
    name would be read by it; a file of all ImageNet is not thinned out for ImageNet-100.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: tuple[str, ...] | None = None,
        rank: int = 0,
        world_size: int = 1,
        fraction: float | None = None,
        key: str = "data.train_path",
    ) -> None:
        self.path = os.fspath(path)
        found = h5_classes(path, key)
        self.classes = found if classes is None else classes
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{key}={self.path}: {len(unknown)} of its classes are not in the training set, such as "
                f"{unknown[0]!r}"
            )
        names, labels = [], []
        with _open(path, key) as file:
            for label, name in enumerate(self.classes):
                images = sorted(file[name]) if name in found else []
                names += [f"{name}/{image}" for image in images]
                labels += [label] * len(images)
        if not names:
            raise ValueError(f"{key}: there are no images in {self.path!r}")
        chosen = take_fraction(np.asarray(labels, dtype=np.int64), fraction)[rank::world_size]
        self._names = np.array([name.encode() for name in names], dtype=np.bytes_)[chosen]
        self._labels: npt.NDArray[np.int64] = np.asarray(labels, dtype=np.int64)[chosen]
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB; an unreadable one raises an error with its name."""
        if self._file is None:  # once per process: an open file does not survive a fork
            self._file = _open(self.path, "data.format=h5")
        name = self._names[index].decode()
        try:
            return to_rgb(Image.open(io.BytesIO(self._file[name][:].tobytes())))
        except Exception as error:  # damaged files raise more than PIL documents
            reason = str(error) or type(error).__name__
            raise UnreadableImageError(
                f"cannot read the image {name!r} of {self.path!r}: {reason}"
            ) from error

    def label(self, index: int) -> int:
        """Class of image ``index``."""
        return int(self._labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
