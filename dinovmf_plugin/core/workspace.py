"""Memory that is kept between steps: large blocks return to a pool when their last tensor dies.

The C library gives large blocks back to the operating system, which zeroes them page by page when they
are touched again: for the gradient of 65536 prototypes that takes half as long as the product that fills
it, and how long depends on what ran before. Kept blocks are touched once.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref

import torch
from torch import Tensor

__all__ = ["Workspace", "room"]

_LARGE = 1 << 22  # bytes; the C library keeps smaller blocks itself
_PAGE = 1 << 21  # a huge page
_SLACK = 1.25  # how much larger than asked a block may be
_IDLE = 256  # a block that so many others were preferred to is given back


class Workspace:
    """Blocks of memory, as many of each size as were in use at once; those that idle are given back.

    A block in use is held by its tensor's storage, gradients and views included, and cannot be handed
    out twice. Without ``MADV_HUGEPAGE`` (not Linux), for small tensors and for other devices than the
    CPU, tensors come from torch's own allocator.

    Example:
        >>> workspace = Workspace()
        >>> first = workspace.empty((1 << 20,), torch.float32, torch.device("cpu")).data_ptr()
        >>> again = workspace.empty((1 << 20,), torch.float32, torch.device("cpu")).data_ptr()
        >>> first == again or not hasattr(mmap, "MADV_HUGEPAGE")
        True
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, mmap.mmap]] = []  # (time of its return, block)
        self._time = 0
        self.mapped = 0  # blocks that were asked of the operating system so far

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialized tensor, like ``torch.empty``."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(math.ceil(size / _PAGE) * _PAGE)
        view = memoryview(block)
        # the storage holds the view, the view's end returns the block
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape)

    def _give_back(self, block: mmap.mmap) -> None:
        self._free.append((self._time, block))

    def _take(self, size: int) -> mmap.mmap:
        self._time += 1
        for entry in sorted(self._free, key=lambda entry: len(entry[1])):
            # not one that is needed for something larger
            if size <= len(entry[1]) <= _SLACK * size and self._claim(entry):
                return entry[1]
        for entry in list(self._free):
            if entry[0] < self._time - _IDLE:
                self._claim(entry)
        self.mapped += 1
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _claim(self, entry: tuple[int, mmap.mmap]) -> bool:
        """Remove a free block; another thread may have been faster."""
        try:
            self._free.remove(entry)
        except ValueError:
            return False
        return True


WORKSPACE = Workspace()


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory from the workspace of this process."""
    return WORKSPACE.empty(shape, dtype, device)
