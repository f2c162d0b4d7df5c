"""Where a run lives: its identity, its folder, its newest whole checkpoint, its lock."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.runs.lock import RunLock, is_first_process
from dinovmf_plugin.runs.written import WrittenFiles
from dinovmf_plugin.training.schema import LOGGERS

__all__ = [
    "choose_folder",
    "find_checkpoint",
    "is_whole",
    "lock_run",
    "make_folder",
    "run_folder",
    "run_identity",
]

# what may change between two starts of the same run
_VOLATILE = (
    "checkpoint",
    "auto_resume",
    "auto_umap",
    *LOGGERS,
    "debug_augmentations",
    "optimizer.base_lr",  # the scaled rates count
    "optimizer.base_classifier_lr",
    "data.num_workers",
    "enable_progress_bar",
)


def run_identity(cfg: DictConfig) -> str:
    """Eight hex digits that are the same for, and only for, the same run (resolved config).

    A folder of images is the same by whatever name: relative, absolute, or through a link. A run that starts
    from a named checkpoint is another run than one that starts afresh.

    Example:
        >>> cfg = OmegaConf.create({"seed": 0, "method_kwargs": {"normalization": "l2"}})
        >>> other = OmegaConf.create({"seed": 0, "method_kwargs": {"normalization": "vmf"}})
        >>> run_identity(cfg) == run_identity(cfg), run_identity(cfg) == run_identity(other)
        (True, False)
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in _VOLATILE:
        *parents, leaf = key.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(leaf, None)
    data = plain.get("data") or {}
    for key in ("train_path", "val_path"):
        if data.get(key):
            data[key] = os.path.realpath(data[key])
    named = plain.pop("resume_from_checkpoint", None)
    if named is not None:
        plain["resume_from_checkpoint"] = os.path.realpath(named)
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint file is complete: a zip archive with a directory and right checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _progress_of(path: Path) -> tuple[int, float]:
    """Epoch and step by the name; the end of an epoch comes after all of its steps."""
    found = re.search(r"-ep(\d+)(?:-step(\d+))?$", path.stem)
    if found is None:
        return -1, 0
    return int(found[1]), float(found[2] or "inf")


def run_folder(cfg: DictConfig) -> Path:
    """``<checkpoint.dir>/<method>/<name>-<identity>``, the first folder of this run.

    Raises:
        ValueError: if name or method is no plain name.
    """
    for key in ("name", "method"):
        value = str(cfg[key])
        if value != Path(value).name or value in ("", ".."):
            raise ValueError(
                f"{key}={value!r} must be a plain name: it becomes a folder in checkpoint.dir"
            )
    return Path(cfg.checkpoint.dir) / cfg.method / f"{cfg.name}-{run_identity(cfg)}"


def choose_folder(cfg: DictConfig, resume_from: str | Path | None) -> Path:
    """The run's folder: that of its own checkpoint ``resume_from``, or one that holds no checkpoint yet.

    ``<dir>/<method>/<name>-<identity>``, with ``-2``, ``-3`` ... appended for a repeated fresh start. A
    checkpoint of another run is only read: its folder is never chosen.
    """
    base = folder = run_folder(cfg)
    if resume_from is not None:
        own = Path(resume_from).parent
        own = own.parent if own.name == "previous" else own
        if own.parent.resolve() == base.parent.resolve() and re.fullmatch(
            rf"{re.escape(base.name)}(-\d+)?", own.name
        ):
            return own
    number = 2
    while any(folder.glob("**/*.ckpt")):
        folder = base.with_name(f"{base.name}-{number}")
        number += 1
    return folder


def lock_run(cfg: DictConfig) -> RunLock | None:
    """Take the lock of this run, whichever of its folders is used; None on all but the first process.

    Raises:
        RunInUseError: if another process trains the run.
        OSError: if ``checkpoint.dir`` cannot be written.
    """
    if not is_first_process():
        return None
    folder = run_folder(cfg)
    make_folder(folder, cfg)
    lock = RunLock(folder)
    lock.acquire()
    return lock


def make_folder(folder: Path, cfg: DictConfig) -> None:
    """Make the run's folder.

    Raises:
        OSError: if it cannot be written; the message names ``checkpoint.dir``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"checkpoint.dir={cfg.checkpoint.dir} cannot be written: {error.strerror}"
        ) from error


def _last_start(base: Path) -> Path:
    """Of ``base``, ``base-2``, ``base-3`` ..., the last one in which training began."""
    numbered = [
        (int(number), folder)
        for folder in base.parent.glob(f"{glob.escape(base.name)}-*")
        if (number := folder.name.removeprefix(f"{base.name}-")).isdecimal()
        and (folder / "args.json").exists()
    ]
    return max(numbered, default=(1, base))[1]


def find_checkpoint(cfg: DictConfig) -> Path | None:
    """The newest whole checkpoint of exactly this run, or None.

    Of a run that was started afresh several times (``choose_folder``), the last start counts. A truncated
    file (power loss, full disk) is passed over in favor of the one before it.
    """
    folder = _last_start(run_folder(cfg))
    recorded = [folder / name for name in WrittenFiles(folder).names() if name.endswith(".ckpt")]
    if not recorded:  # a folder of an older version
        by_name = [*folder.glob("*.ckpt"), *folder.glob("previous/*.ckpt")]
        recorded = sorted(by_name, key=_progress_of)
    for path in reversed(recorded):
        if is_whole(path):
            return path
        print(f"checkpoint {path} is truncated or damaged: using the one before it")
    return None
