"""Images in tar archives, read by their position: nothing is unpacked, and any image is one read away.

Two layouts: the folders of an image folder (``data.source=tar``), and webdataset's shards, where an image
``0001.jpg`` has its class in ``0001.cls`` (``data.source=wds``). The headers are read once, from header to
header; the content is passed over.

Differs from upstream: timm's ``ReaderImageInTar`` and ``ReaderWds`` give the same images and classes, and
read whole archives to list them, share open files between processes, or leave damaged images out silently.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.folders import IMAGE_EXTENSIONS
from dinovmf_plugin.data.source import NO_LABEL, Listing
from dinovmf_plugin.data.sources.labels import NoLabelsError, index_labels

__all__ = ["TarImages", "list_shards", "list_tar"]

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A file inside an archive."""

    name: str
    """Its path in the archive; archives within lead the way as folders."""
    archive: int
    offset: int
    size: int


class _Part(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this file
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            self._at = 0
            raise OSError("the position lies before the start of the file")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file.fileno(), count, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if hasattr(self, "_file"):  # it may not have been opened
            self._file.close()
        super().close()


def _open_part(path: str, offset: int, size: int) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Part(path, offset, size), 4096))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _walk(path: str, archive: int, offset: int, size: int, within: str) -> Iterator[Member]:
    """The files of an archive and of the archives in it, in their order."""
    with _open_part(path, offset, size) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (entry := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # of a million entries only the offsets are kept
            name = os.path.normpath(entry.name).lstrip("/")
            if not entry.isfile() or _hidden(name):
                continue
            place, name = offset + entry.offset_data, os.path.join(within, name)
            if name.lower().endswith(".tar"):
                yield from _walk(path, archive, place, entry.size, name[: -len(".tar")])
            else:
                yield Member(name, archive, place, entry.size)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(
            b"\0"
        ):  # what ends in the middle does not end with zeros
            raise tarfile.ReadError("a header in the middle is damaged")


def find_archives(path: str | os.PathLike[str], key: str, source: str) -> list[str]:
    """The archives that a key names: one, those of a folder, or those that a pattern (``*``) fits, sorted.

    Raises:
        FileNotFoundError: there is none, in one sentence.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return [path]
    is_folder = os.path.isdir(path)
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar") if is_folder else path))
    if not found:
        what = "is a folder without .tar files" if is_folder else "does not exist"
        raise FileNotFoundError(
            f"{key}: {path!r} {what} (data.source={source} reads local tar archives: a file, a folder of "
            "them, or a pattern such as 'shards/train-*.tar')"
        )
    return found


@functools.lru_cache(maxsize=4)
def _members(stamps: tuple[tuple[str, int, int], ...], prefixed: bool, key: str) -> list[Member]:
    """All files in the archives; ``stamps`` are paths, sizes and times of change."""
    found = []
    for archive, (path, size, _) in enumerate(stamps):
        with open(path, "rb") as file:
            start = file.read(6)
        if start.startswith(_COMPRESSED):
            raise ValueError(
                f"{key}: {path!r} is compressed, so no image can be found by its position: decompress it "
                "once (JPEG and PNG are compressed already)"
            )
        try:
            within = Path(path).stem if prefixed else ""
            found += list(_walk(path, archive, 0, size, within))
        except tarfile.TarError as error:
            raise ValueError(f"{key}: {path!r} is no whole tar archive: {error}") from error
    return found


def _list(
    path: str | os.PathLike[str], key: str, source: str
) -> tuple[tuple[str, ...], list[Member]]:
    archives = find_archives(path, key, source)
    stats = [os.stat(archive) for archive in archives]
    stamps = tuple((a, s.st_size, s.st_mtime_ns) for a, s in zip(archives, stats, strict=True))
    return tuple(archives), _members(stamps, os.path.normpath(path) not in archives, key)


@dataclass(frozen=True)
class TarImages(Listing):
    """Images inside tar archives.

    Attributes:
        archives: paths of the archives.
        archive: ``(N,)`` int64, the archive of each image.
        offsets: ``(N,)`` int64, where its content begins.
        sizes: ``(N,)`` int64 bytes.
    """

    archives: tuple[str, ...]
    archive: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    columns: ClassVar[tuple[str, ...]] = ("names", "labels", "archive", "offsets", "sizes")

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        archives: tuple[str, ...],
        members: Sequence[Member],
        labels: npt.NDArray[np.int64],
        classes: tuple[str, ...],
    ) -> TarImages:
        """The given members of the archives."""
        names = np.array([os.fsencode(member.name) for member in members], dtype=np.bytes_)
        numbers = np.array([member[1:] for member in members], dtype=np.int64).reshape(-1, 3)
        return cls(Path(path), names, labels, classes, archives, *numbers.T.copy())

    def open(self, index: int) -> BinaryIO:
        """Image ``index`` as a file."""
        archive = self.archives[self.archive[index]]
        return _open_part(archive, int(self.offsets[index]), int(self.sizes[index]))

    def read(self, index: int) -> bytes:
        """The content of image ``index``."""
        with open(self.archives[self.archive[index]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self.sizes[index]), int(self.offsets[index]))

    def files(self) -> Iterator[str]:
        """The archives."""
        yield from self.archives


def _no_images(path: str | os.PathLike[str], key: str, why: str = "") -> ValueError:
    return ValueError(
        f"{key}: there are no images ({', '.join(IMAGE_EXTENSIONS)}) in {str(path)!r}{why}"
    )


def list_tar(
    path: str | os.PathLike[str], *, labeled: bool = True, key: str = "data.train_path"
) -> TarImages:
    """List the images of an archive of folders, or of a folder of archives.

    Args:
        path: see :func:`find_archives`. The class of an image is its innermost folder; an archive among
            several, or inside another one, counts as a folder of its name without ``.tar``.
        labeled: whether innermost folders are classes.
        key: config key of the path, for messages.

    Returns:
        The list, in the order of the same images in folders; classes are sorted by name.

    Raises:
        FileNotFoundError: there is no archive.
        ValueError: an archive is damaged or compressed, there are no images, or none lies in a folder.
    """
    archives, members = _list(path, key, "tar")
    found = [m for m in members if m.name.lower().endswith(IMAGE_EXTENSIONS)]
    if not found:
        raise _no_images(path, key)

    def place(member: Member) -> list[tuple[bool, str]]:
        *folders, name = member.name.split("/")
        return [*((False, folder) for folder in folders), (True, name)]  # as folders are walked

    found.sort(key=place)
    if not labeled:
        none = np.full(len(found), NO_LABEL, dtype=np.int64)
        return TarImages.of(path, archives, found, none, ())
    loose = [member.name for member in found if "/" not in member.name]
    if loose:
        error = NoLabelsError if len(loose) == len(found) else ValueError
        raise error(
            f"{key}: {len(loose)} of {len(found)} images of {str(path)!r} lie in no folder, such as "
            f"{loose[0]!r}: put them into one folder per class or set data.no_labels=True"
        )
    labels, classes = index_labels([member.name.split("/")[-2] for member in found], str(path))
    return TarImages.of(path, archives, found, labels, classes)


def _shard_label(text: bytes, field: str | None, where: str) -> int | str:
    try:
        if field is not None:
            value: int | str = json.loads(text)[field]
            return value
        return int(text)
    except (ValueError, KeyError, TypeError) as error:
        what = f"field {field!r}" if field is not None else "whole number"
        raise ValueError(f"{where} has no {what} as a class") from error


def list_shards(
    path: str | os.PathLike[str],
    *,
    labeled: bool = True,
    key: str = "data.train_path",
    image_key: str | None = None,
    label_key: str | None = None,
) -> TarImages:
    """List the samples of webdataset's shards, in the order of the shards.

    Args:
        path: see :func:`find_archives`.
        labeled: whether to read the classes.
        key: config key of the path, for messages.
        image_key: endings of the images, such as ``jpg;png``, without the dot; by default all that are known.
        label_key: field of ``NAME.json`` that holds the class; by default the number in ``NAME.cls``.

    Returns:
        The list; classes are numbers where the shards have numbers.

    Raises:
        FileNotFoundError: there is no shard.
        ValueError: a shard is damaged, there are no images, or an image has no class.
    """
    archives, members = _list(path, key, "wds")
    endings = {f".{e.lower()}" for e in image_key.split(";")} if image_key else IMAGE_EXTENSIONS
    beside = ".cls" if label_key is None else ".json"
    images: dict[tuple[int, str], Member] = {}
    notes: dict[tuple[int, str], Member] = {}
    for member in members:
        folder, file = os.path.split(member.name)
        stem, dot, ending = file.partition(".")  # webdataset's rule: up to the first dot
        sample = (member.archive, os.path.join(folder, stem))
        if dot + ending.lower() in endings:
            images.setdefault(sample, member)
        elif dot + ending.lower() == beside:
            notes[sample] = member
    if not images:
        raise _no_images(path, key, f" with data.image_key={image_key}" if image_key else "")
    found = list(images.values())
    if not labeled:
        none = np.full(len(found), NO_LABEL, dtype=np.int64)
        return TarImages.of(path, archives, found, none, ())
    lacking = [member.name for sample, member in images.items() if sample not in notes]
    if lacking:
        error = NoLabelsError if len(lacking) == len(found) else ValueError
        raise error(
            f"{key}: {len(lacking)} of {len(found)} images of {str(path)!r} have no {beside} file beside "
            f"them, such as {lacking[0]!r}: set data.no_labels=True to go without classes"
        )
    kept = [notes[sample] for sample in images]
    none = np.full(len(kept), NO_LABEL, dtype=np.int64)
    texts = TarImages.of(path, archives, kept, none, ())
    values = [
        _shard_label(texts.read(i), label_key, f"{key}: {texts.path(i)!r}")
        for i in range(len(texts))
    ]
    return TarImages.of(path, archives, found, *index_labels(values, f"{key}={path}"))
