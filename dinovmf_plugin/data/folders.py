"""Lists of images in folders, labeled or not, in an order that no file system decides."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.source import NO_LABEL, Listing

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFolder(Listing):
    """The images of a folder."""

    def read(self, index: int) -> bytes:
        """The content of file ``index``."""
        return Path(self.path(index)).read_bytes()

    def open(self, index: int) -> BinaryIO:
        """File ``index``."""
        return open(self.path(index), "rb")

    def stamps(self) -> Iterator[bytes]:
        """Name, size, time of change and label of every image."""
        for i, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            stat = os.stat(self.path(i))
            yield bytes(name) + f"\t{stat.st_size}\t{stat.st_mtime_ns}\t{label}\n".encode()


def _holds(folder: str, path: Path) -> bool:
    outer, inner = os.path.realpath(folder), os.path.realpath(path)
    return os.path.commonpath([outer, inner]) == outer


def _walk(root: Path, below: str = "") -> Iterator[str]:
    """Relative paths of the images below ``root/below``, sorted, hidden entries left out."""
    with os.scandir(root / below) as scan:
        entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if entry.is_dir():
            if entry.is_symlink() and _holds(entry.path, root / below):
                raise ValueError(f"{entry.path} is a link to a folder that holds it: remove it")
            yield from _walk(root, os.path.join(below, entry.name))
    for entry in entries:
        # pipes and the like are no images; a link to nothing is, so that it is named
        is_file = entry.is_file() or (entry.is_symlink() and not entry.is_dir())
        if is_file and entry.name.lower().endswith(IMAGE_EXTENSIONS):
            yield os.path.join(below, entry.name)


def _names(paths: Sequence[str]) -> npt.NDArray[np.bytes_]:
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def list_images(
    root: str | os.PathLike[str], *, labeled: bool = True, key: str = "data.train_path"
) -> ImageFolder:
    """List the images of a folder.

    Args:
        root: the folder. With labels it holds one folder per class, as torchvision's ImageFolder;
            images may lie at any depth below it. Without labels all images at any depth count.
        labeled: whether the top folders are classes.
        key: name of the config key that holds the path, for messages.

    Returns:
        The list, sorted by path; classes are sorted by name.

    Raises:
        FileNotFoundError: the path does not exist or is not a folder.
        ValueError: there are no images, or no class folders, or a class without images.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{key}: {str(root)!r} {what}")
    known = ", ".join(IMAGE_EXTENSIONS)
    if not labeled:
        paths = list(_walk(root))
        if not paths:
            raise ValueError(f"{key}: there are no images ({known}) in {str(root)!r}")
        return ImageFolder(root, _names(paths), np.full(len(paths), NO_LABEL, dtype=np.int64), ())

    with os.scandir(root) as scan:
        entries = [e for e in scan if not e.name.startswith(".")]
    classes = sorted(e.name for e in entries if e.is_dir())
    loose = sum(e.name.lower().endswith(IMAGE_EXTENSIONS) for e in entries if not e.is_dir())
    if not classes:
        if loose:
            raise ValueError(
                f"{key}: {str(root)!r} has {loose} images but no class folders; "
                "put them into one folder per class or set data.no_labels=True"
            )
        raise ValueError(f"{key}: there are no images ({known}) in {str(root)!r}")
    if loose:
        warnings.warn(
            f"{key}: {loose} images that lie beside the class folders of {str(root)!r} are left out",
            stacklevel=2,
        )
    by_class = [list(_walk(root, name)) for name in classes]
    empty = [name for name, paths in zip(classes, by_class, strict=True) if not paths]
    if len(empty) == len(classes):
        raise ValueError(f"{key}: there are no images ({known}) in {str(root)!r}")
    if empty:
        raise ValueError(
            f"{key}: the class folder {str(root / empty[0])!r} has no images ({known})"
        )
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in by_class])
    paths = [path for group in by_class for path in group]
    return ImageFolder(root, _names(paths), labels.astype(np.int64), tuple(classes))


def class_names(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the class folders of ``root``, sorted, without looking into them."""
    with os.scandir(root) as scan:
        return tuple(sorted(e.name for e in scan if e.is_dir() and not e.name.startswith(".")))


def check_fraction(fraction: float | None) -> float | None:
    """Read ``data.fraction``: None, -1 and 1 mean all images.

    Raises:
        ValueError: anything else outside (0, 1).
    """
    if fraction is None or fraction in (-1, 1):
        return None
    if not 0 < fraction < 1:
        raise ValueError(
            f"data.fraction must be above 0 and at most 1, or -1 for all images, got {fraction!r}"
        )
    return float(fraction)


def take_fraction(
    labels: npt.NDArray[np.int64], fraction: float | None, *, seed: int = 42
) -> npt.NDArray[np.int64]:
    """Chooses a share of the images, the same share of every class.

    Args:
        labels: ``(N,)`` class indices.
        fraction: share to keep, see :func:`check_fraction`.
        seed: of the choice; not the run's seed, so that runs that differ in their seed train on the
            same images.

    Returns:
        Sorted indices, int64; at least one per class.

    Raises:
        ValueError: the fraction is out of range.

    Example:
        >>> take_fraction(np.array([0] * 8 + [1] * 4), 0.5).shape
        (6,)
    """
    share = check_fraction(fraction)
    if share is None:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members)))
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
