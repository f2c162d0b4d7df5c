"""Loaders on torchvision and PyTorch's DataLoader."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.recipe import Recipe
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.data.source import ImageSource
from dinovmf_plugin.data.transforms import MultiCropTransform

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def worker_start_method(num_workers: int) -> str | None:
    """How worker processes start: not by forking once DALI's threads run, which can deadlock them.

    Example:
        >>> worker_start_method(0) is None
        True
    """
    if num_workers == 0:
        return None
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        # joblib's processes (hydra's launcher) call theirs "loky", a name that workers do not know
        multiprocessing.set_start_method("forkserver", force=True)
    elif "nvidia.dali" not in sys.modules:
        return None
    # imported once by the server that forks the workers, not by every worker: seconds each
    multiprocessing.set_forkserver_preload([__name__, "dinovmf_plugin.data.evaluation_loaders"])
    # workers end with the server that forked them: it inherits a mask against signals to the whole job
    resource_tracker.ensure_running()  # would start with the server, and clears the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return "forkserver"


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """For worker processes: Ctrl-C and SLURM signal all processes of a job, but the parent decides.

    It needs its workers to finish a step. A second SIGTERM ends them: PyTorch uses it to clean up.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Take a worker's traceback, which PyTorch puts into the message, off an unreadable image's sentence."""
    try:
        yield
    except UnreadableImageError as error:
        sentence = str(error).rsplit(f"{UnreadableImageError.__name__}: ", 1)[-1].strip()
        raise UnreadableImageError(sentence) from error


class _CropDataset(Dataset[Any]):
    """Maps (epoch, item) to one training sample; holds no state that changes."""

    def __init__(self, source: ImageSource, recipe: Recipe, seed: int) -> None:
        self.source = source
        self.transform = MultiCropTransform(recipe)
        self.seed = seed

    def __getitem__(self, key: tuple[int, Any]) -> tuple[int, list[torch.Tensor], int]:
        epoch, item = key
        index = self.source.index(item)
        crops = self.transform(self.source.image(item), seed=self.seed, epoch=epoch, index=index)
        return index, crops, self.source.label(item)


class _EpochBatches:
    """Batch sampler over (epoch, item) pairs.

    The epoch travels with every item because persistent workers keep the copy of the data set that
    they were started with.
    """

    def __init__(self, source: ImageSource, plan: EpochPlan) -> None:
        self.source = source
        self.plan = plan
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        for batch in self.source.batches(self.plan, self.epoch, self.start):
            yield [(self.epoch, item) for item in batch]


class PretrainLoader(ResumableLoader):
    """Training batches of all crops, computed by torchvision in worker processes.

    Yields ``[indexes (B,) int64, [crops (B, 3, size, size) float32, ...], targets (B,) int64]``,
    the batch format of solo-learn. Order and crops are a function of (seed, epoch, index): the same
    for any number of workers.

    Args:
        source: images and labels.
        recipe: the crops.
        plan: batches of this rank.
        num_workers: worker processes; 0 works in the main process.
        pin_memory: pin the batches for the copy to a GPU; by default where there is one.
        prefetch_factor: batches that each worker prepares ahead.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        plan: EpochPlan,
        *,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__(plan)
        self._order = _EpochBatches(source, plan)
        self._loader = DataLoader(
            _CropDataset(source, recipe, plan.seed),
            batch_sampler=self._order,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            persistent_workers=num_workers > 0,
            multiprocessing_context=worker_start_method(num_workers),
            worker_init_fn=leave_signals_to_the_parent,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            # PyTorch draws seeds for the workers; not from the stream that initializes the model.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        """End the worker processes now: left to the interpreter's exit, they complain on their way."""
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def _batches(self, epoch: int, start: int) -> Iterator[list[Any]]:
        self._order.epoch, self._order.start = epoch, start
        with errors_in_one_sentence():
            yield from self._loader
