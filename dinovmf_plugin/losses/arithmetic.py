"""Two tools of the passes: products that accumulate in float32, and a running log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["RunningSum", "add_product", "add_product_of_small_rows"]


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``out <- a b`` (beta 0) or ``out + alpha a b`` (beta 1); ``out`` may be wider than a and b."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        product = torch.ops.aten.mm.dtype(a, b, out.dtype)
    elif a.dtype == torch.float16:  # sums over prototypes may exceed 65504
        product = torch.mm(a.to(out.dtype), b.to(out.dtype))
    else:
        product = torch.mm(a, b)
    return out.add_(product, alpha=alpha) if beta else out.copy_(product)


def add_product_of_small_rows(
    out: Tensor, a: Tensor, rows: Tensor, beta: float, scratch: Tensor
) -> None:
    """``out <- a rows`` or ``out + a rows`` in the dtype of ``a``: float16 would flush rows of 1e-8 to 0.

    Args:
        out: ``(m, p)``.
        a: ``(m, rows)``.
        rows: ``(rows, p)`` in the dtype of ``out``.
        beta: 0 or 1.
        scratch: memory like ``out``.
    """
    if a.dtype != torch.float16:
        add_product(out, a, rows.to(a.dtype), beta=beta)
        return
    peak = rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    part = scratch if beta else out
    add_product(part, a, (rows / peak).to(a.dtype), beta=0).mul_(peak)
    if beta:
        out.add_(part)


class RunningSum:
    """``log sum_k exp(l_k)`` of many rows while the logits arrive in chunks (online softmax).

    Args:
        like: gives number of rows, dtype and device.
        bounded: whether no ``exp(l)`` can over- or underflow: then the shift is 0 and no maximum is
            searched, which would cost two passes over every chunk.

    Example:
        >>> logits = torch.tensor([[1.0], [2.0], [3.0]])  # three prototypes, one row
        >>> running = RunningSum(logits[0], bounded=False)
        >>> for chunk in logits.clone().split(2):
        ...     decay = running.add(chunk)
        >>> bool(torch.isclose(running.lse(), logits.logsumexp(0)).all())
        True
    """

    def __init__(self, like: Tensor, bounded: bool) -> None:
        self.bounded = bounded
        self.total = like.new_zeros(len(like))
        start = 0.0 if bounded else -math.inf
        self.shift = torch.full_like(self.total, start)

    def add(self, chunk: Tensor) -> Tensor | None:
        """Replace logits ``(prototypes, rows)`` by ``exp(l - shift)`` and add them up.

        Returns:
            ``(rows,)``, by what earlier sums of ``exp(l - shift)`` are to be multiplied; None for 1.
        """
        decay = None
        if not self.bounded:
            previous, self.shift = self.shift, torch.maximum(self.shift, chunk.amax(dim=0))
            decay = (previous - self.shift).exp_()
            self.total.mul_(decay)
            chunk.sub_(self.shift)
        self.total.add_(chunk.exp_().sum(dim=0))
        return decay

    def lse(self) -> Tensor:
        """The log-sum-exp so far, ``(rows,)``."""
        return self.shift + self.total.log()
