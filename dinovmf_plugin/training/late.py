"""A number of the device, read when it has been computed, without waiting for what was asked after it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LateNumber"]


class LateNumber:
    """A scalar on its way to the processor.

    ``float(tensor)`` waits until a GPU has done all that it was told so far. This copies the number in
    the device's own order of work; ``read`` later waits for that copy alone.

    Args:
        value: one element, of any device.

    Example:
        >>> LateNumber(torch.tensor(2.5)).read()
        2.5
    """

    def __init__(self, value: Tensor) -> None:
        value = value.detach().reshape(()).float()
        self._event = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.cpu()

    def read(self) -> float:
        """The number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host.numpy())
