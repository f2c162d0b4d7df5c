"""The files that a run wrote itself: nothing else in its folder is ever moved, replaced or deleted."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["RECORD", "WrittenFiles"]

RECORD = "checkpoints.json"


class WrittenFiles:
    """Record ``checkpoints.json`` of a folder: name, size, time and order of every file written through it.

    A file belongs to the run if it is recorded and has not changed since: what a user copies into the folder,
    or puts in the place of a recorded file, does not. The record is on disk before a file gets its name, so
    that a run killed at any moment leaves no file of its own behind that it would not know again.

    Args:
        folder: the run's folder; the record may be absent (a folder of an older version, or a new one).

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> record = WrittenFiles(folder)
        >>> _ = (folder / "theirs.ckpt").write_text("theirs")
        >>> path = record.write("ours.ckpt", lambda file: file.write(b"ours"), order=(0, 3))
        >>> [WrittenFiles(folder).owns(folder / name) for name in ("ours.ckpt", "theirs.ckpt")]
        [True, False]
        >>> record.delete(folder / "theirs.ckpt")
        False
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self._unfinished: str | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            self._files, self._unfinished = dict(stored["files"]), stored["unfinished"]

    def names(self) -> list[str]:
        """Recorded files that exist, relative to the folder, in the order given when they were written."""
        found = [name for name in self._files if (self.folder / name).is_file()]
        return sorted(found, key=lambda name: tuple(self._files[name]["order"]))

    def owns(self, path: Path) -> bool:
        """Whether the run wrote this very file."""
        entry = self._files.get(self._name(path))
        try:
            found = path.lstat()
        except OSError:
            return False
        return entry is not None and _stamp(found) == (entry["size"], entry["mtime_ns"])

    def write(
        self, name: str, write: Callable[[IO[bytes]], object], order: tuple[int, ...]
    ) -> Path:
        """Fill a temporary file, then give it ``name``, or ``name-2`` .. if a foreign file has that name.

        Returns:
            Where the file is.

        Raises:
            OSError, RuntimeError: whatever ``write`` raises; nothing is left of the attempt.
        """
        target = self.free(self.folder / name)
        handle, temporary = tempfile.mkstemp(
            dir=self.folder, prefix=f".{target.name}.", suffix=".part"
        )
        try:
            with os.fdopen(handle, "wb") as file:
                self._unfinished = Path(temporary).name
                self._save()
                write(file)
                file.flush()
                os.fsync(file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.fchmod(file.fileno(), 0o666 & ~umask)  # mkstemp's 0600 hides it from a team
            size, mtime = _stamp(os.stat(temporary))
            entry = {"size": size, "mtime_ns": mtime, "order": list(order)}
            self._files[self._name(target)] = entry
            self._save(coming=target)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._unfinished = None
        self._save()
        return target

    def free(self, path: Path) -> Path:
        """``path``, or the first of ``path-2``, ``path-3`` .. at which no foreign file stands."""
        number, chosen = 2, path
        while os.path.lexists(chosen) and not self.owns(chosen):
            chosen = path.with_name(f"{path.stem}-{number}{path.suffix}")
            number += 1
        return chosen

    def move(self, path: Path, target: Path) -> Path | None:
        """Rename a file that the run wrote, to ``target-2`` .. where a foreign file has the name.

        Returns:
            The new place; None, and nothing is done, if the run did not write it.
        """
        if not self.owns(path):
            return None
        target = self.free(target)
        entry = self._files[self._name(path)]
        self._files[self._name(target)] = entry
        self._save(coming=target)
        path.replace(target)
        del self._files[self._name(path)]
        return target

    def set_aside(self, path: Path) -> Path | None:
        """Rename a recorded file that the disk damaged to ``path.damaged``; None if not recorded."""
        if self._files.pop(self._name(path), None) is None:
            return None
        target = self.free(path.with_name(path.name + ".damaged"))
        path.replace(target)
        self._save()
        return target

    def delete(self, path: Path) -> bool:
        """Delete a file that the run wrote; False, and nothing is done, if it did not."""
        if not self.owns(path):
            return False
        path.unlink()
        del self._files[self._name(path)]
        return True

    def clear_unfinished(self) -> None:
        """Delete what an interrupted ``write`` left behind."""
        if self._unfinished is not None:
            with contextlib.suppress(OSError):
                (self.folder / self._unfinished).unlink()
            self._unfinished = None
        self._save()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _save(self, coming: Path | None = None) -> None:
        """Write the record, without files that are gone; ``coming`` is about to appear."""
        kept = None if coming is None else self._name(coming)
        self._files = {
            name: entry
            for name, entry in self._files.items()
            if name == kept or (self.folder / name).is_file()
        }
        text = json.dumps({"files": self._files, "unfinished": self._unfinished}, indent=2)
        temporary = self.folder / f".{RECORD}.part"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / RECORD)


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns
