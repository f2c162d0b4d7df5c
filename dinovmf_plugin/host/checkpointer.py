"""Training checkpoints: written atomically, the last epoch included, resumable without mistake.

Differs from upstream (solo-learn's Checkpointer): the final epoch is always saved, a new file never
replaces the old one before it is whole, the folder is named after the configuration (two cells of an
ablation cannot resume from each other), and of two runs of one configuration the second does not write
into the first's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.host import GENERATION

__all__ = ["Checkpointer", "choose_folder", "find_checkpoint", "is_whole", "run_identity"]

if GENERATION == "main":
    # Lightning lets a model's callback replace the Trainer's only if it is a subclass of it
    from solo.utils.checkpointer import Checkpointer as _HostCheckpointer
else:
    _HostCheckpointer = Callback

# what may change between two starts of the same run
_VOLATILE = (
    "checkpoint",
    "auto_resume",
    "resume_from_checkpoint",
    "wandb",
    "debug_augmentations",
    "data.num_workers",
    "enable_progress_bar",
)


def run_identity(cfg: DictConfig) -> str:
    """Eight hex digits that are the same for, and only for, the same run (resolved config).

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
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint file is complete: a zip archive with a directory and right checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _epoch_of(path: Path) -> int:
    with contextlib.suppress(ValueError):
        return int(path.stem.rsplit("-ep", 1)[-1])
    return -1


def _folder(cfg: DictConfig) -> Path:
    return Path(cfg.checkpoint.dir) / cfg.method / f"{cfg.name}-{run_identity(cfg)}"


def choose_folder(cfg: DictConfig, resume_from: str | Path | None) -> Path:
    """The run's folder: the resumed run's own, or one that holds no checkpoint yet.

    ``<dir>/<method>/<name>-<identity>``, with ``-2``, ``-3`` ... appended for a repeated fresh start.
    """
    if resume_from is not None:
        folder = Path(resume_from).parent
        return folder.parent if folder.name == "previous" else folder
    base = folder = _folder(cfg)
    number = 2
    while any(folder.glob("**/*.ckpt")):
        folder = base.with_name(f"{base.name}-{number}")
        number += 1
    return folder


def find_checkpoint(cfg: DictConfig) -> Path | None:
    """The newest whole checkpoint of exactly this run, or None.

    A truncated file (power loss, full disk) is passed over in favour of the one before it.
    """
    folder = _folder(cfg)
    candidates = [*folder.glob("*.ckpt"), *folder.glob("previous/*.ckpt")]
    for path in sorted(candidates, key=_epoch_of, reverse=True):
        if is_whole(path):
            return path
        print(f"checkpoint {path} is truncated or damaged: using the one before it")
    return None


class Checkpointer(_HostCheckpointer):
    """Saves ``<dir>/<method>/<name>-<identity>/<name>-ep<epoch>.ckpt`` and ``args.json`` beside it.

    The folder holds exactly one ``.ckpt``; the one before it waits in ``previous/`` (all of them with
    ``checkpoint.keep_prev``).

    Args:
        cfg: the resolved config, with the ``checkpoint`` node of the host.
    """

    def __init__(self, cfg: DictConfig) -> None:
        Callback.__init__(self)
        self.cfg = cfg
        self.frequency = max(1, int(cfg.checkpoint.frequency))
        self.keep_prev = bool(cfg.checkpoint.keep_prev)
        self.path = _folder(cfg)
        self.last_ckpt: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose the folder; ``pl_module.run_folder`` tells it to the other callbacks.

        Not in ``setup``, where Lightning does not know yet that it is going to resume.
        """
        given = self.cfg.checkpoint.get("folder")
        path = given or choose_folder(self.cfg, trainer.ckpt_path)
        self.path = Path(trainer.strategy.broadcast(str(path)))
        pl_module.run_folder = self.path
        if trainer.ckpt_path is not None:  # also if there is nothing left to train
            whole = [p for p in self.path.glob("*.ckpt") if is_whole(p)]
            self.last_ckpt = max(whole, key=_epoch_of, default=Path(trainer.ckpt_path))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write ``args.json`` and clear away what an interrupted write left."""
        if trainer.is_global_zero:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                args = OmegaConf.to_container(self.cfg, resolve=True)
                temporary = self.path / "args.json.tmp"
                temporary.write_text(json.dumps(args, indent=2, default=str))
                temporary.replace(self.path / "args.json")
            except OSError as error:
                raise OSError(
                    f"checkpoint.dir={self.cfg.checkpoint.dir} cannot be written: {error.strerror}"
                ) from error
            for left_over in self.path.glob("*.ckpt.tmp"):
                left_over.unlink()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save every ``frequency`` epochs, and the last epoch in any case."""
        epoch = trainer.current_epoch
        last = trainer.should_stop or epoch + 1 == trainer.max_epochs
        if last or (epoch + 1) % self.frequency == 0:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint beside its place, then move it there."""
        target = self.path / f"{self.cfg.name}-ep{trainer.current_epoch}.ckpt"
        temporary = target.with_name(target.name + ".tmp")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                self._put_in_place(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            kept = f"{self.last_ckpt} is untouched" if self.last_ckpt else "there is none before it"
            raise OSError(
                f"checkpoint {target} could not be written: {error.strerror or error}; {kept}"
            ) from error
        self.last_ckpt = target

    def _put_in_place(self, temporary: Path, target: Path) -> None:
        previous = self.path / "previous"
        previous.mkdir(exist_ok=True)
        before = [p for p in self.path.glob("*.ckpt") if p != target]
        temporary.replace(target)
        for path in before:
            path.replace(previous / path.name)
        if not self.keep_prev:
            for path in sorted(previous.glob("*.ckpt"), key=_epoch_of)[:-1]:
                path.unlink()
