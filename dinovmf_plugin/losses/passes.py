"""The two passes over chunks of prototypes, which never hold all logits.

First pass, one chunk of prototypes after the other: ``exp(l - shift)``, its running sum, and from the
same chunk of prototypes the sums ``sum_k softmax(l)_k w_k`` and ``sum_k t_k w_k`` that the embeddings'
gradient and the loss itself need. Second pass: ``d loss / d l = a softmax(l) - targets`` times the rows is
the prototypes' gradient. Logits are stored prototype-major: a chunk of prototypes is one contiguous block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dinovmf_plugin.core.workspace import room
from dinovmf_plugin.losses.arithmetic import RunningSum, add_product, add_product_of_small_rows
from dinovmf_plugin.losses.plan import Plan

__all__ = ["Passes", "Problem", "PrototypeGradients"]

_SAFE = 40.0  # exp(+-40), and sums of 2^30 of them, are far inside float32's and bfloat16's range


@dataclass(frozen=True)
class Problem:
    """The tensors of one call.

    Attributes:
        y: student rows ``(rows, p)`` divided by the temperature, in the dtype of all sums.
        weight: ``(K, p)``.
        scale: ``(K,)`` or None: the prototypes are ``scale_k weight_k``.
        norms: ``||weight_k||`` ``(K,)``, if ``scale_k = magnitude_k / norms_k`` and the gradients are
            to be those of weight and magnitude; None for those of weight and scale.
        bias: ``(K,)`` or None.
        targets: ``(teacher rows, K)``.
    """

    y: Tensor
    weight: Tensor
    scale: Tensor | None
    norms: Tensor | None
    bias: Tensor | None
    targets: Tensor

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
        return float(bound.detach().numpy())


class PrototypeGradients:
    """Unwritten gradients of weight, factor (scale or magnitude) and bias; None where not wanted.

    Args:
        problem: gives shapes, dtype and device.
        needs: whether weight, factor and bias want a gradient.
    """

    def __init__(self, problem: Problem, needs: list[bool]) -> None:
        (k, p), y = problem.weight.shape, problem.y
        self.needs = needs
        # factor's is made from weight's
        self.weight = room((k, p), y.dtype, y.device) if needs[0] or needs[1] else None
        self.factor = y.new_empty(k) if needs[1] else None
        self.bias = y.new_empty(k) if needs[2] else None

    def wanted(self) -> list[Tensor | None]:
        """The gradients in the order of the arguments."""
        return [self.weight if self.needs[0] else None, self.factor, self.bias]


class Passes:
    """Both passes over one problem.

    Args:
        problem: the tensors.
        plan: strategy and sizes.
    """

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.operand = problem, plan.operand
        y, (k, dim) = problem.y, problem.weight.shape
        # float16 would flush targets of 1e-8 to 0; theirs is a small part of the work
        self.target_operand = y.dtype if plan.operand == torch.float16 else plan.operand
        size = min(plan.columns, k)
        self.chunks = [(lo, min(lo + size, k)) for lo in range(0, k, size)]
        self.scratch = room((size, dim), y.dtype, y.device)
        self.bounded = plan.stored != torch.float16 and problem.bound < _SAFE

    def prototypes(self, lo: int, hi: int) -> Tensor:
        """Effective prototypes of one chunk, as operand."""
        w, scale = self.problem.weight[lo:hi], self.problem.scale
        if scale is not None:
            w = torch.mul(w, scale[lo:hi, None], out=self.scratch[: hi - lo])
        return w.to(self.operand)

    def logits(self, w: Tensor, columns: Tensor, lo: int, hi: int, out: Tensor) -> Tensor:
        """Logits of one chunk ``(prototypes, rows)`` in ``out``; ``columns`` are the rows ``(p, rows)``."""
        if self.problem.bias is None:
            return add_product(out, w, columns, beta=0)
        bias = self.problem.bias[lo:hi, None]
        if self.operand == out.dtype:
            return torch.addmm(bias, w, columns, out=out)
        return add_product(out, w, columns, beta=0).add_(bias)

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
        columns = y.to(self.operand).t()
        in_place = stored is not None and stored.dtype == y.dtype
        work = stored if in_place else room((len(self.scratch), len(y)), y.dtype, y.device)
        assert work is not None
        running, shifts = RunningSum(y[:, 0], self.bounded), []
        for lo, hi in self.chunks:
            w = self.prototypes(lo, hi)
            e = self.logits(w, columns, lo, hi, work[lo:hi] if in_place else work[: hi - lo])
            decay = running.add(e)  # e is exp(l - shift) now
            shifts.append(running.shift)
            if stored is not None and not in_place:
                rounded = stored[lo:hi].copy_(e)
                e = rounded if rounded.dtype == self.operand else e
            if mean is not None:
                if decay is not None:
                    mean.mul_(decay[:, None])
                add_product(mean, e.to(self.operand).t(), w, beta=1)
            if target_mean is not None:
                t = self.problem.targets[:, lo:hi].to(self.target_operand)
                add_product(target_mean, t, w.to(self.target_operand), beta=1)
        if mean is not None:
            mean.div_(running.total[:, None])
        return running.lse(), torch.stack(shifts)

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
            t = self.problem.targets[:, lo:hi].to(self.target_operand).t()
            if grads.weight is not None:
                d, scratch = grads.weight[lo:hi], self.scratch[: hi - lo]
                # every factor of a row goes into the small operand
                add_product_of_small_rows(d, e, factor[:, None] * y, beta, scratch)
                if first:
                    add_product(d, t, mixed.to(self.target_operand), beta=1, alpha=-1)
                if last:
                    self._finish(grads.weight, grads.factor, lo, hi)
            if grads.bias is not None:  # after the product: e is in cache now
                b = grads.bias[lo:hi]
                torch.addmv(b, e.to(y.dtype), factor, beta=beta, out=b)
                if first:
                    b.addmv_(t.to(y.dtype), mass, alpha=-1)

    def _finish(self, grad: Tensor, grad_factor: Tensor | None, lo: int, hi: int) -> None:
        """From the gradient of the effective prototypes to those of weight and factor."""
        scale, norms = self.problem.scale, self.problem.norms
        if scale is None:
            return
        d, v = grad[lo:hi], self.problem.weight[lo:hi]
        if grad_factor is not None or norms is not None:
            along = torch.mul(d, v, out=self.scratch[: hi - lo]).sum(dim=1)
            if norms is not None:
                along.div_(norms[lo:hi])
                d.addcmul_(v, (along / norms[lo:hi])[:, None], value=-1)
            if grad_factor is not None:
                grad_factor[lo:hi] = along
        d.mul_(scale[lo:hi, None])
