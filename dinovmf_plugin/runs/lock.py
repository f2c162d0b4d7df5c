"""One process at a time works on a run: a lock that ends with its process, and who holds it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["RunInUseError", "RunLock", "is_first_process", "release_locks"]

_LOCK, _HOLDER = "run.lock", "running.json"
_DYING = 20.0  # seconds that the loader processes of a killed run may need to end
_held: set[RunLock] = set()
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


class RunInUseError(OSError):
    """Another process works on this run now."""


def is_first_process() -> bool:
    """Whether this is the first process of its run, by what torchrun, SLURM and Lightning tell it.

    Known before there is a process group: only the first process takes the run's lock.
    """
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANKS)


class RunLock:
    """``run.lock`` in a run's folder, and ``running.json`` beside it: process, host and time of the holder.

    The operating system holds the lock for the process: one that is killed leaves none behind. Taking it
    again in the same process is allowed, and has to be released as often.

    Args:
        folder: an existing folder.
        doing: what the holder does with the run, for messages.
        advice: what else could be done, for messages.
    """

    def __init__(
        self,
        folder: Path,
        doing: str = "trained",
        advice: str = "another seed, name or checkpoint.dir is another run",
    ) -> None:
        self.folder, self._doing, self._advice = folder, doing, advice
        # the real path: two spellings of a folder are one lock
        self._lock = FileLock(
            os.path.realpath(folder / _LOCK), is_singleton=True, thread_local=False
        )

    def acquire(self) -> None:
        """Take the lock at once.

        Raises:
            RunInUseError: if another process holds it; the message names the process, its host and since when
        """
        held = self._lock.is_locked
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self._holder()
            if not _is_dead(holder):
                raise RunInUseError(self._told(holder)) from None
            try:
                self._lock.acquire(timeout=_DYING)
            except Timeout:
                raise RunInUseError(self._told(holder)) from None
        _held.add(self)
        if not held:
            content = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            (self.folder / _HOLDER).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def release(self, force: bool = False) -> None:
        """Give the lock back; ``force`` however often it was taken."""
        _held.discard(self)
        if not self._lock.is_locked:
            return
        if force or self._lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                (self.folder / _HOLDER).unlink()
        self._lock.release(force=force)

    def _holder(self) -> dict[str, Any]:
        for _ in range(20):  # the holder writes it right after it has taken the lock
            with contextlib.suppress(OSError, ValueError):
                found: dict[str, Any] = json.loads((self.folder / _HOLDER).read_text())
                return found
            time.sleep(0.1)
        return {}

    def _told(self, holder: dict[str, Any]) -> str:
        who = "another process"
        if holder:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        return (
            f"this run is already being {self._doing} in {self.folder} by {who}: wait for it or stop it; "
            f"{self._advice}"
        )


def release_locks() -> None:
    """Give back all locks of this process, before another one is to go on with its run."""
    for lock in list(_held):
        lock.release(force=True)


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
