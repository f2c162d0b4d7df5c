"""Count what one training step asks of the device: kernels, and reads that wait for it.

PyTorch's dispatcher sees every operation of forward, backward, clipping, optimizer and EMA. Views and
empty memory launch nothing and are left out; an operation over a list of tensors counts once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches", "StepLaunches"]

_NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",  # counted as a wait
        "_unsafe_view",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
    )
)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


class Launches(TorchDispatchMode):
    """Counts operations while it is entered, backward passes included.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> with Launches() as counted:
        ...     y = x.view(3, 1).add(1).sum()
        ...     number = float(y)
        >>> counted.total, counted.waits
        (2, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do it."""
        if not func.is_view:
            self.operations[func._schema.name] += 1
        if func._schema.name in _INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.operations["aten::nonzero"] += 1  # below the dispatcher
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operations that launch a kernel."""
        return sum(n for name, n in self.operations.items() if name not in _NOTHING)

    @property
    def waits(self) -> int:
        """Reads for which the processor would wait until a GPU has caught up."""
        return sum(self.operations[name] for name in WAITS)


class StepLaunches(Callback):
    """Counts the operations of one step of a Trainer, by phase, up to the next step's beginning.

    Args:
        step: which batch, counted from 0; the first one also makes the optimizer's state.

    Attributes:
        phases: ``forward``, ``backward``, ``update`` (clipping and optimizer) and ``after`` (EMA, logs).
    """

    def __init__(self, step: int = 1) -> None:
        self.step = step
        self.phases: dict[str, Launches] = {}
        self._counter: Launches | None = None

    def _enter(self, phase: str | None) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        if phase is not None:
            self._counter = self.phases[phase] = Launches()
            self._counter.__enter__()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Forward begins."""
        self._enter("forward" if batch_idx == self.step else None)

    def on_before_backward(self, *_: Any) -> None:
        """Backward begins."""
        if self._counter is not None:
            self._enter("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Clipping begins."""
        if self._counter is not None:
            self._enter("update")

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer is done; what the method does after it lasts until the next batch."""
        if self._counter is not None:
            self._enter("after")

    def on_train_end(self, *_: Any) -> None:
        """There was no next batch."""
        self._enter(None)

    @property
    def total(self) -> int:
        """Operations of the whole step that launch a kernel."""
        return sum(counted.total for counted in self.phases.values())

    @property
    def waits(self) -> int:
        """Reads of the whole step for which the processor would wait."""
        return sum(counted.waits for counted in self.phases.values())

    @property
    def operations(self) -> Counter[str]:
        """All operations by name."""
        return sum((counted.operations for counted in self.phases.values()), Counter())
