"""Signals while training: the current step is finished, a checkpoint is written, then the run ends.

==========================  ==================================================================
SIGINT (Ctrl-C)             ends the run with a checkpoint; a second one stops at once
SIGTERM (preemption, kill)  ends the run with a checkpoint
SIGUSR1, SIGUSR2            if something requeues the job on them (Lightning under SLURM, submitit): that
                            happens after the checkpoint, not in the middle of a step
==========================  ==================================================================
"""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

from dinovmf_plugin.core import distributed

__all__ = ["StopRequest"]

_ENDING = (signal.SIGINT, signal.SIGTERM)
_REQUEUEING = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """A signal that arrived, kept until all ranks are between two steps.

    Handlers are Python's: they run in the main thread between two bytecodes, hence anywhere in a step,
    where the teacher may lag behind the student and a collective may be under way. So they only note.

    Differs from upstream (Lightning): a checkpoint made inside the signal handler, or a broadcast there,
    may fall between an optimizer step and the teacher's, or between two collectives.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.agreed: int | None = None
        self._handlers: dict[int, Any] = {}

    def install(self) -> None:
        """Take the place of today's handlers; Lightning puts those back when ``fit`` ends."""
        self.noted = self.agreed = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*_ENDING, *_REQUEUEING):
            handler = signal.getsignal(number)
            if number in _ENDING or callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = number  # first: the next signal may come while this is printed
        if number == signal.SIGINT:
            with contextlib.suppress(RuntimeError):  # it came in the middle of another print
                print(
                    "\ninterrupted: finishing this step and writing a checkpoint; "
                    "Ctrl-C again stops at once",
                    flush=True,
                )

    def agree(self, trainer: Trainer) -> bool:
        """Whether any rank was signalled; all ranks get the same answer, and must ask together."""
        number = self.noted or 0
        if distributed.is_distributed():
            shared = torch.tensor(number, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            number = int(shared)
        if number:
            self.agreed = number
        return bool(number)

    def pass_on(self) -> None:
        """Let a requeueing handler do its work, now that there is a checkpoint."""
        if self.agreed in _REQUEUEING:
            self._handlers[self.agreed](self.agreed, None)
