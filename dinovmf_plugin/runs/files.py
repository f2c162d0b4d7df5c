"""Files that are whole or not there: every result of the project is written here."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "as_json",
    "file_digest",
    "keep_previous",
    "listing_digest",
    "name_not_utf8",
    "replacing",
    "write_file",
    "write_json",
]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place when the block ends, and vanishes if it fails.

    Folders are made as needed. The draft is synced to the disk first, and gets the permissions that a
    new file has here (a draft's own 0600 would hide results from a team).

    Raises:
        OSError: naming ``path``, if the disk is full or the folder cannot be written; what was there stays.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(path) as draft:
        ...     _ = draft.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".draft-", suffix=path.suffix)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Write a whole file: bytes, text (UTF-8), or what a function writes into the opened file.

    Raises:
        OSError: see ``replacing``.
    """
    with replacing(path) as draft, open(draft, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def as_json(value: Any) -> Any:
    """A value as JSON holds it: paths are text, numbers that are not finite are null.

    Example:
        >>> as_json({"mAP": float("nan"), "scales": (1.0, 0.5), "file": Path("a")})
        {'mAP': None, 'scales': [1.0, 0.5], 'file': 'a'}
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON; see ``as_json`` for what becomes of values that JSON lacks.

    Raises:
        OSError: see ``replacing``.
    """
    write_file(path, json.dumps(as_json(value), indent=2, allow_nan=False) + "\n")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def keep_previous(path: Path) -> Path | None:
    """Move an existing file aside (``results.json`` to ``results.1.json`` ...): nothing is overwritten.

    Returns:
        The new place, or None if there was no such file.
    """
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def listing_digest(paths: Iterable[str | Path]) -> str:
    """SHA-256 of the files' names, sizes and times of the last change, in the given order.

    Another picture under an old name is noticed without reading every byte.

    Raises:
        FileNotFoundError: if a file is missing.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a.jpg"
        >>> _ = path.write_bytes(b"1234")
        >>> before = listing_digest([path])
        >>> os.utime(path, ns=(0, 0))
        >>> before == listing_digest([path])
        False
    """
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        name = os.fsencode(os.path.basename(path))
        digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def name_not_utf8(paths: Iterable[str | Path]) -> str | None:
    r"""The first file name that is no UTF-8, in a form that can be shown; None if all are.

    Example:
        >>> name_not_utf8(["a.jpg", os.fsdecode(b"caf\xe9.jpg")])
        'caf\\xe9.jpg'
    """
    for path in paths:
        try:
            os.fsencode(path).decode("utf-8")
        except UnicodeDecodeError:
            return os.fsencode(path).decode("utf-8", "backslashreplace")
    return None
