"""The two passes over chunks of prototypes behind ``prototype_cross_entropy``.

With logits ``l_i = W y_i + b``, student rows ``i`` and teacher rows ``j``, the loss
``sum_ij c_ij (sum_k t_jk lse(l_i) - <t_j, l_i>)`` is linear but for one log-sum-exp per student row:

* targets are added up first: ``sum_ij c_ij <t_j, l_i> = sum_j <W ybar_j + m_j b, t_j>`` with
  ``ybar_j = sum_i c_ij y_i`` and ``m_j = sum_i c_ij``: products of as many rows as the teacher has,
  not one per pair of views;
* ``d loss / d l_i = a_i softmax(l_i) - targets``, so ``exp(l - shift)`` is computed once per logit,
  while its chunk is in cache, and every factor of a row goes into the small operand of a product.

Logits are stored prototype-major: a chunk of prototypes is one contiguous block.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Kernel", "Plan", "PrototypeGradients", "choose_plan", "multiplies_natively", "room"]

_HALF = (torch.bfloat16, torch.float16)
_SAFE = 40.0  # exp(+-40), and sums of 2^30 of them, are far inside float32's and bfloat16's range


@dataclass(frozen=True)
class Plan:
    """How to walk through the (student rows) x K logits.

    The exponentials wait for their rows' normalisers before they can give the prototypes' gradients:
    until the backward pass (``keep``, one block), or for the end of their block of student rows.
    """

    keep: bool
    rows: int  # student rows of one block
    columns: int  # prototypes of one chunk
    stored: torch.dtype  # of waiting exponentials
    operand: torch.dtype  # of the operands of products


def choose_plan(weight: Tensor, rows: int, dtype: torch.dtype, product: torch.dtype) -> Plan:
    """Strategy and sizes for ``rows`` student rows, sums in ``dtype``, products in ``product``.

    On a CPU one block takes at most 96 MiB (or the memory of the prototypes' own gradient) and one
    chunk 8 MiB: smaller ones are no faster on an idle machine, and slower on a busy one, where threads
    wait for each other after every operation. Elsewhere, too, launches are what counts.
    """
    num_prototypes, dim = weight.shape
    device = weight.device.type
    block, chunk = (3 << 23, 1 << 21) if device == "cpu" else (1 << 28, 1 << 26)
    blocks = math.ceil(rows / max(block // num_prototypes, dim))
    block_rows = math.ceil(rows / blocks)
    chunks = math.ceil(num_prototypes / max(chunk // max(block_rows, dim), 256))
    columns = min(math.ceil(num_prototypes / chunks / 64) * 64, num_prototypes)
    operand = product if multiplies_natively(product, device) else dtype
    return Plan(blocks == 1, block_rows, columns, product, operand)


def multiplies_natively(dtype: torch.dtype, device: str) -> bool:
    """Whether to multiply in this dtype: a CPU without it is faster, and more exact, in float32."""
    if dtype not in _HALF or device != "cpu":
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return dtype == torch.bfloat16 and supported is not None and bool(supported())


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, on a Linux CPU in huge pages if it is large.

    The operating system zeroes fresh memory page by page when it is first touched. In pages of 4 KiB
    that took 22 ms for the gradient of 65536 prototypes, half as long as the product that fills it.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < 1 << 22 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=dtype).view(shape)


def _addmm(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
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


class Kernel:
    """The tensors of one call, and the two passes.

    Args:
        y: student rows ``(rows, p)`` divided by the temperature, in the dtype of all sums.
        weight: ``(K, p)``.
        scale: ``(K,)`` or None: the prototypes are ``scale_k weight_k``.
        norms: ``||weight_k||`` ``(K,)``, if ``scale_k = magnitude_k / norms_k`` and the gradients are
            to be those of weight and magnitude; None for those of weight and scale.
        bias: ``(K,)`` or None.
        targets: ``(teacher rows, K)``.
        plan: strategy and sizes.
    """

    def __init__(
        self,
        y: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        norms: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        plan: Plan,
    ) -> None:
        self.y, self.weight, self.scale, self.norms = y, weight, scale, norms
        self.bias, self.targets = bias, targets
        self.operand = plan.operand
        # float16 would flush targets of 1e-8 to 0; theirs is a small part of the work
        self.target_operand = y.dtype if plan.operand == torch.float16 else plan.operand
        size, k = plan.columns, weight.shape[0]
        self.chunks = [(lo, min(lo + size, k)) for lo in range(0, k, size)]
        self.scratch = room((min(size, k), weight.shape[1]), y.dtype, y.device)
        self.wide = plan.stored != torch.float16

    @cached_property
    def bound(self) -> float:
        """An upper bound of ``|l|`` by Cauchy-Schwarz; infinity where asking would wait for a GPU."""
        if self.y.device.type != "cpu":
            return math.inf
        norms = self.norms
        if norms is None:
            norms = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.y.dtype)
        length = norms if self.scale is None else norms * self.scale.abs()
        bound = length.max() * torch.linalg.vector_norm(self.y, dim=1).max()
        if self.bias is not None:
            bound = bound + self.bias.abs().max()
        return float(bound)

    def prototypes(self, lo: int, hi: int) -> Tensor:
        """Effective prototypes of one chunk, as operand."""
        w = self.weight[lo:hi]
        if self.scale is not None:
            w = torch.mul(w, self.scale[lo:hi, None], out=self.scratch[: hi - lo])
        return w.to(self.operand)

    def normalize(
        self, y: Tensor, stored: Tensor | None, mean: Tensor | None, target_mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """First pass: log-sum-exp of some student rows, and whatever needs the same chunks.

        Args:
            y: the student rows ``(rows, p)``.
            stored: ``(K, rows)``, filled with ``exp(l - shift)``; None to keep nothing.
            mean: zeros ``(rows, p)``, filled with ``sum_k softmax(l)_k w_k``.
            target_mean: zeros ``(teacher rows, p)``, filled with ``sum_k t_k w_k``.

        Returns:
            ``lse (rows,)`` and the shifts ``(chunks, rows)``.
        """
        operand = y.to(self.operand).t()
        in_place = stored is not None and stored.dtype == y.dtype
        work = stored if in_place else room((len(self.scratch), len(y)), y.dtype, y.device)
        assert work is not None
        # a running maximum costs two passes over every chunk: leave it out where it cannot matter
        bounded = self.wide and self.bound < _SAFE
        total = y.new_zeros(len(y))
        shift = torch.zeros_like(total) if bounded else torch.full_like(total, -math.inf)
        shifts = []
        for lo, hi in self.chunks:
            w = self.prototypes(lo, hi)
            e = work[lo:hi] if in_place else work[: hi - lo]
            if self.bias is None:
                _addmm(e, w, operand, beta=0)
            elif self.operand == y.dtype:
                torch.addmm(self.bias[lo:hi, None], w, operand, out=e)
            else:
                _addmm(e, w, operand, beta=0).add_(self.bias[lo:hi, None])
            if not bounded:
                previous, shift = shift, torch.maximum(shift, e.amax(dim=0))
                decay = (previous - shift).exp_()
                total.mul_(decay)
                if mean is not None:
                    mean.mul_(decay[:, None])
                e.sub_(shift)
            shifts.append(shift)
            total.add_(e.exp_().sum(dim=0))
            if stored is not None and not in_place:
                rounded = stored[lo:hi].copy_(e)
                e = rounded if rounded.dtype == self.operand else e
            if mean is not None:
                _addmm(mean, e.to(self.operand).t(), w, beta=1)
            if target_mean is not None:
                t = self.targets[:, lo:hi].to(self.target_operand)
                _addmm(target_mean, t, w.to(self.target_operand), beta=1)
        if mean is not None:
            mean.div_(total[:, None])
        return shift + total.log(), torch.stack(shifts)

    def add_gradients(
        self,
        grads: PrototypeGradients,
        y: Tensor,
        stored: Tensor,
        factors: Tensor,
        mixed: Tensor,
        mass: Tensor,
        first: bool = True,
        last: bool = True,
    ) -> None:
        """Second pass: the part of some student rows in the prototypes' gradients.

        Args:
            grads: where to add (to write, in the first block of rows).
            y: the student rows ``(rows, p)``.
            stored: ``exp(l - shift)`` ``(K, rows)``.
            factors: ``a exp(shift - lse)`` ``(chunks, rows)``, turns ``stored`` into ``a softmax``.
            mixed: ``ybar (teacher rows, p)``, used in the first block.
            mass: ``m (teacher rows,)``, used in the first block.
            first: whether this is the first block of rows.
            last: whether this is the last one: then ``grads`` are finished.
        """
        beta = 0 if first else 1
        for (lo, hi), factor in zip(self.chunks, factors, strict=True):
            e = stored[lo:hi].to(self.operand)
            t = self.targets[:, lo:hi].to(self.target_operand).t()
            if grads.weight is not None:
                d, rows = grads.weight[lo:hi], factor[:, None] * y
                if self.operand == torch.float16:  # would flush 1e-8 to 0
                    peak = rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
                    part = d if first else self.scratch[: hi - lo]
                    _addmm(part, e, (rows / peak).to(self.operand), beta=0).mul_(peak)
                    if not first:
                        d.add_(part)
                else:
                    _addmm(d, e, rows.to(self.operand), beta=beta)
                if first:
                    _addmm(d, t, mixed.to(self.target_operand), beta=1, alpha=-1)
                if last:
                    self._finish(grads.weight, grads.factor, lo, hi)
            if grads.bias is not None:  # after the product: e is in cache now
                b = grads.bias[lo:hi]
                torch.addmv(b, e.to(y.dtype), factor, beta=beta, out=b)
                if first:
                    b.addmv_(t.to(y.dtype), mass, alpha=-1)

    def _finish(self, grad: Tensor, grad_factor: Tensor | None, lo: int, hi: int) -> None:
        """From the gradient of the effective prototypes to those of weight and factor."""
        if self.scale is None:
            return
        d, v = grad[lo:hi], self.weight[lo:hi]
        if grad_factor is not None or self.norms is not None:
            along = torch.mul(d, v, out=self.scratch[: hi - lo]).sum(dim=1)
            if self.norms is not None:
                norms = self.norms[lo:hi]
                along.div_(norms)
                d.addcmul_(v, (along / norms)[:, None], value=-1)
            if grad_factor is not None:
                grad_factor[lo:hi] = along
        d.mul_(self.scale[lo:hi, None])


class PrototypeGradients:
    """Unwritten gradients of weight, factor (scale or magnitude) and bias; None where not wanted.

    Args:
        kernel: gives shapes, dtype and device.
        needs: whether weight, factor and bias want a gradient.
    """

    def __init__(self, kernel: Kernel, needs: list[bool]) -> None:
        k, p = kernel.weight.shape
        make, self.needs = kernel.y.new_empty, needs
        self.weight = None
        if needs[0] or needs[1]:  # factor's is made from weight's
            self.weight = room((k, p), kernel.y.dtype, kernel.y.device)
        self.factor = make(k) if needs[1] else None
        self.bias = make(k) if needs[2] else None

    def wanted(self) -> list[Tensor | None]:
        """The gradients in the order of the arguments."""
        return [self.weight if self.needs[0] else None, self.factor, self.bias]
