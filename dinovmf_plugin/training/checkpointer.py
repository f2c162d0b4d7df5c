"""Training checkpoints: written atomically, the last epoch included, resumable without mistake.

Differs from upstream (solo-learn's Checkpointer): the final epoch is always saved, and the step at which a
run is stopped by a signal; a new file never replaces the old one before it is whole; the folder is named
after the configuration (two cells of an ablation cannot resume from each other), and of two runs of one
configuration the second does not write into the first's folder, nor starts while the first is running. Only
files that the run wrote itself (``runs.written``) are moved or deleted.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.host import HostCheckpointer
from dinovmf_plugin.runs.files import write_file
from dinovmf_plugin.runs.lock import RunLock, release_locks
from dinovmf_plugin.runs.written import WrittenFiles
from dinovmf_plugin.training.folders import (
    choose_folder,
    is_whole,
    lock_run,
    make_folder,
    run_folder,
)
from dinovmf_plugin.training.interruption import StopRequest

__all__ = ["Checkpointer"]


def _os_error(error: BaseException | None) -> OSError | None:
    """The file system's error behind what torch's archive writer makes of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _WholeFile(TorchCheckpointIO):
    """Writes beside the target and renames; keeps an error, which all ranks are to raise together.

    Differs from upstream: Lightning makes the file in memory, then in the system's temporary folder, which
    may be another and smaller disk.
    """

    def __init__(self, record: WrittenFiles, order: tuple[int, int]) -> None:
        super().__init__()
        self.record, self.order = record, order
        self.path: Path | None = None
        self.error: str | None = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        def write(file: IO[bytes]) -> None:
            torch.save(checkpoint, file)

        try:
            self.path = self.record.write(Path(path).name, write, self.order)
        except (OSError, RuntimeError) as error:
            reason = _os_error(error)
            if reason is None:
                raise
            self.error = reason.strerror or str(reason)


class Checkpointer(HostCheckpointer):
    """Saves ``<dir>/<method>/<name>-<identity>/<name>-ep<epoch>.ckpt`` and ``args.json`` beside it.

    The folder holds exactly one ``.ckpt``; the one before it waits in ``previous/`` (all of them with
    ``checkpoint.keep_prev``); files that the run did not write stay as they are. A run that a signal stops
    (Ctrl-C, SIGTERM) is saved after the current optimizer step as ``<name>-ep<epoch>-step<step>.ckpt`` and
    ends with status 128 + signal.

    Args:
        cfg: the resolved config, with the ``checkpoint`` node of the host.
    """

    def __init__(self, cfg: DictConfig) -> None:
        Callback.__init__(self)
        self.cfg = cfg
        self.frequency = max(1, int(cfg.checkpoint.frequency))
        self.keep_prev = bool(cfg.checkpoint.keep_prev)
        self.path = run_folder(cfg)
        self.last_ckpt: Path | None = None
        self.stop = StopRequest()
        self._saved_step = self._step_before = -1
        self._record = WrittenFiles(self.path)
        self._lock: RunLock | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose the folder; ``pl_module.run_folder`` tells it to the other callbacks.

        Not in ``setup``, where Lightning does not know yet that it is going to resume.
        """
        chosen: tuple[str, OSError | None] = ("", None)
        if trainer.is_global_zero:
            try:
                chosen = (str(self._choose(trainer.ckpt_path)), None)
            except OSError as error:
                chosen = ("", error)
        path, refused = trainer.strategy.broadcast(chosen)
        if refused is not None:
            raise refused
        self.path = Path(path)
        self._record = WrittenFiles(self.path)
        pl_module.run_folder = self.path
        if trainer.ckpt_path is not None:  # also if there is nothing left to train
            top = [self.path / name for name in self._record.names() if "/" not in name]
            whole = [path for path in reversed(top) if is_whole(path)]
            self.last_ckpt = whole[0] if whole else Path(trainer.ckpt_path)

    def _choose(self, resumed: str | Path | None) -> Path:
        given = self.cfg.checkpoint.get("folder")
        if given:  # by ``pretrain``, which has locked the run
            return Path(given)
        self._lock = lock_run(self.cfg)
        # the host's main_pretrain.py gives either what its auto_resume found or a named checkpoint
        found = OmegaConf.select(self.cfg, "auto_resume.enabled", default=False)
        return choose_folder(self.cfg, resumed if found else None)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write ``args.json``, put aside what an interrupted write left, and take over signals."""
        if trainer.is_global_zero:
            make_folder(self.path, self.cfg)
            args = OmegaConf.to_container(self.cfg, resolve=True)
            write_file(self.path / "args.json", json.dumps(args, indent=2, default=str))
            self._record.clear_unfinished()
            for name in self._record.names():
                if not is_whole(self.path / name):  # it must not push the one before it out
                    self._record.set_aside(self.path / name)
        self.stop.install()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, to tell micro-batches that end in an optimizer step."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for the end of training if a signal came; Lightning ends it once the step is complete."""
        if trainer.global_step > self._step_before and self.stop.agree(trainer):
            # the flag behind trainer.received_sigterm, which has no setter
            trainer._signal_connector.received_sigterm = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save every ``frequency`` epochs, and the last epoch in any case."""
        epoch = trainer.current_epoch
        last = trainer.should_stop or epoch + 1 == trainer.max_epochs
        if last or self.stop.agreed or (epoch + 1) % self.frequency == 0:
            self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the step at which a signal ended training, and say how to go on."""
        try:
            if isinstance(exception, SIGTERMException) and self.stop.agreed is not None:
                self._stop_on_signal(trainer, exception)
        finally:
            self._release()

    def _stop_on_signal(self, trainer: Trainer, exception: SIGTERMException) -> None:
        assert self.stop.agreed is not None
        if trainer.global_step != self._saved_step:
            self.save(trainer, f"-step{trainer.global_step}")
        name = signal.Signals(self.stop.agreed).name
        if trainer.is_global_zero:
            print(
                f"stopped by {name} after step {trainer.global_step}: {self.last_ckpt} is written; the "
                "same command with auto_resume.enabled=True goes on from there",
                flush=True,
            )
        release_locks()  # the requeued job may start before this process has ended
        # Lightning writes a checkpoint of its own beside ours before it requeues: recorded, as the oldest,
        # so that it goes like the others instead of being found again by a later job
        usual = trainer.strategy.checkpoint_io
        trainer.strategy.checkpoint_io = _WholeFile(self._record, (-1, 0))
        try:
            self.stop.pass_on()
        finally:
            trainer.strategy.checkpoint_io = usual
        if trainer.local_rank == 0:  # Lightning kills a parent whose child's status is not 0
            exception.code = 128 + self.stop.agreed

    def save(self, trainer: Trainer, suffix: str = "") -> None:
        """Write the checkpoint beside its place, then move it there.

        Raises:
            OSError: on every rank, if it cannot be written; the one before it stays.
        """
        target = self.path / f"{self.cfg.name}-ep{trainer.current_epoch}{suffix}.ckpt"
        order = (trainer.current_epoch, trainer.global_step)
        file, usual = _WholeFile(self._record, order), trainer.strategy.checkpoint_io
        trainer.strategy.checkpoint_io = file
        try:
            trainer.save_checkpoint(target)
        finally:
            trainer.strategy.checkpoint_io = usual
        written, error = trainer.strategy.broadcast((file.path, file.error))
        if written is None:
            kept = f"{self.last_ckpt} is untouched" if self.last_ckpt else "there is none before it"
            raise OSError(f"checkpoint {target} could not be written: {error}; {kept}")
        if trainer.is_global_zero:
            self._tidy(written)
        self.last_ckpt, self._saved_step = written, trainer.global_step

    def _tidy(self, newest: Path) -> None:
        previous = self.path / "previous"
        previous.mkdir(exist_ok=True)
        for name in self._record.names():
            if "/" not in name and self.path / name != newest:
                self._record.move(self.path / name, previous / name)
        if not self.keep_prev:
            kept = [name for name in self._record.names() if name.startswith("previous/")]
            for name in kept[:-1]:
                self._record.delete(self.path / name)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the run's lock back."""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None
