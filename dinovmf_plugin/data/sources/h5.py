"""Images in one HDF5 file, as solo-learn's ``convert_imgfolder_to_h5.py`` writes it.

One group per class, in it one data set of bytes per image: the image file as it was.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dinovmf_plugin.data.source import NO_LABEL, Listing

__all__ = ["H5Images", "list_h5"]

_files = threading.local()  # of each thread of each process: an open file does not survive a fork


def _open(path: str | os.PathLike[str], key: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "data.source=h5 needs h5py, which is not installed: pip install h5py, or set data.source=folder"
        ) from error
    if not Path(path).is_file():
        what = "is a folder, not an HDF5 file" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{key}: {str(path)!r} {what} (data.source=h5)")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{key}: {str(path)!r} is no HDF5 file (data.source=h5)") from error


class H5Images(Listing):
    """The images of a file."""

    def read(self, index: int) -> bytes:
        """The content of image ``index``."""
        place = (str(self.root), os.getpid())
        if getattr(_files, "place", None) != place:
            _files.place, _files.file = place, _open(self.root, "data.source=h5")
        data: bytes = _files.file[self.name(index)][:].tobytes()
        return data


def list_h5(
    path: str | os.PathLike[str], *, labeled: bool = True, key: str = "data.train_path"
) -> H5Images:
    """List the images of a file, sorted; its groups are the classes.

    Args:
        path: the file.
        labeled: whether to keep the classes.
        key: config key of the file, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, or has no classes or no images.
        ImportError: h5py is not installed.

    Differs from upstream: no list of the images is left in the home directory, where another file of the same
    name would be read by it; a file of all ImageNet is not thinned out for ImageNet-100.
    """
    with _open(path, key) as file:
        groups = {name: sorted(g) for name, g in sorted(file.items()) if hasattr(g, "keys")}
    if not groups:
        raise ValueError(f"{key}: there are no groups, one per class, in {str(path)!r}")
    names = [f"{group}/{image}" for group, images in groups.items() for image in images]
    if not names:
        raise ValueError(f"{key}: there are no images in {str(path)!r}")
    labels = np.repeat(np.arange(len(groups)), [len(images) for images in groups.values()])
    if not labeled:
        labels = np.full(len(names), NO_LABEL)
    encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
    return H5Images(Path(path), encoded, labels.astype(np.int64), tuple(groups) if labeled else ())
