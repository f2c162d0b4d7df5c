"""Soft-target cross-entropy over many prototypes without storing ``(views, N, K)`` tensors twice.

With logits ``l_i = W y_i / tau + b``, student rows ``i = (view, n)`` and teacher rows ``j = (q, n)``,
the loss ``sum_ij c_ij (sum_k t_jk lse(l_i) - <t_j, l_i>)`` is linear but for one log-sum-exp per row:

* targets are added up first: ``sum_ij c_ij <t_j, l_i> = sum_j <W ybar_j + m_j b, t_j>`` with
  ``ybar_j = sum_i c_ij y_i / tau`` and ``m_j = sum_i c_ij``: products of as many rows as the teacher
  has, not one per pair of views;
* ``d loss / d l_i = a_i softmax(l_i) - targets``: ``exp(l - shift)`` is computed once per logit while
  its chunk is in cache, and every factor of a row goes into the small operand of a product.

Prototypes are visited in chunks, stored prototype-major: a chunk is one contiguous block. If the
prototypes want a gradient, their exponentials must wait for the rows' normalisers: in one buffer until
the backward pass (``keep``), or in a buffer for a block of rows whose gradients are finished at once.
Otherwise nothing is stored: one pass gives the loss and the gradient of the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["prototype_cross_entropy"]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Plan:
    """How to walk through the (student rows) x K logits."""

    keep: bool  # all exponentials wait for backward; else block by block, gradients in forward
    rows: int  # student rows of one block
    columns: int  # prototypes of one chunk
    stored: torch.dtype  # dtype of waiting exponentials
    operand: torch.dtype  # dtype of the operands of products


def _choose_plan(weight: Tensor, rows: int, dtype: torch.dtype, product: torch.dtype) -> _Plan:
    num_prototypes, dim = weight.shape
    cpu = weight.device.type == "cpu"
    # CPU: one block takes about the memory of the prototypes' own gradient, one chunk 1.5 MiB of
    # cache. On accelerators launches are what counts: large blocks, large chunks.
    block, chunk = (1 << 24, 3 << 17) if cpu else (1 << 28, 1 << 26)
    blocks = math.ceil(rows / max(block // num_prototypes, dim))
    block_rows = math.ceil(rows / blocks)
    columns = min(max(chunk // block_rows // 256, 2) * 256, num_prototypes)
    operand = product if _multiplies(product, cpu) else dtype
    return _Plan(blocks == 1, block_rows, columns, product, operand)


def _multiplies(dtype: torch.dtype, cpu: bool) -> bool:
    """Whether to multiply in this dtype; a CPU without it is faster, and exact, in float32."""
    if dtype not in _HALF or not cpu:
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return dtype == torch.bfloat16 and supported is not None and bool(supported())


def _addmm(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``out <- beta out + alpha a b``, where ``out`` may be wider than the operands."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        product = torch.ops.aten.mm.dtype(a, b, out.dtype)
    elif a.dtype == torch.float16:  # sums over prototypes may exceed 65504
        product = torch.mm(a.to(out.dtype), b.to(out.dtype))
    else:
        product = torch.mm(a, b).to(out.dtype)
    return torch.mul(product, alpha, out=out) if beta == 0 else out.add_(product, alpha=alpha)


class _Kernel:
    """The tensors of one call, and the two passes over chunks of prototypes."""

    def __init__(
        self,
        y: Tensor,  # (rows, p), divided by the temperature, in the dtype of all sums
        weight: Tensor,  # (K, p)
        scale: Tensor | None,  # (K,)
        bias: Tensor | None,  # (K,)
        targets: Tensor,  # (teacher rows, K)
        plan: _Plan,
    ) -> None:
        self.y, self.weight, self.scale, self.bias, self.targets = y, weight, scale, bias, targets
        self.operand = plan.operand
        # float16 would flush targets of 1e-8 to 0; theirs is a small part of the work
        self.target_operand = y.dtype if plan.operand == torch.float16 else plan.operand
        size, k = plan.columns, weight.shape[0]
        self.chunks = [(lo, min(lo + size, k)) for lo in range(0, k, size)]
        self.scratch = y.new_empty(min(size, k), weight.shape[1])

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
        work = stored if in_place else y.new_empty(len(self.scratch), len(y))
        assert work is not None
        shift = y.new_full((len(y),), -math.inf)
        total = torch.zeros_like(shift)
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
            previous, shift = shift, torch.maximum(shift, e.amax(dim=0))
            decay = (previous - shift).exp_()
            shifts.append(shift)
            e.sub_(shift).exp_()
            total.mul_(decay).add_(e.sum(dim=0))
            if stored is not None and not in_place:
                stored[lo:hi].copy_(e)
            if mean is not None:
                _addmm(mean.mul_(decay[:, None]), e.to(self.operand).t(), w, beta=1)
            if target_mean is not None:
                t = self.targets[:, lo:hi].to(self.target_operand)
                _addmm(target_mean, t, w.to(self.target_operand), beta=1)
        if mean is not None:
            mean.div_(total[:, None])
        return shift + total.log(), torch.stack(shifts)

    def add_prototype_gradients(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        y: Tensor,
        stored: Tensor,
        factors: Tensor,
        mixed: Tensor | None,
        mass: Tensor | None,
    ) -> None:
        """Second pass: add some student rows' part to the gradients of weight, scale and bias.

        Args:
            grads: of weight, scale, bias; None where not wanted.
            y: the student rows ``(rows, p)``.
            stored: ``exp(l - shift)`` ``(K, rows)``.
            factors: ``a exp(shift - lse)`` ``(chunks, rows)``, turns ``stored`` into ``a softmax``.
            mixed: ``ybar (teacher rows, p)``; None in all blocks of rows but one.
            mass: ``m (teacher rows,)``, likewise.
        """
        grad_weight, grad_scale, grad_bias = grads
        product = torch.empty_like(self.scratch)
        for (lo, hi), factor in zip(self.chunks, factors, strict=True):
            e = stored[lo:hi].to(self.operand)
            t = self.targets[:, lo:hi].to(self.target_operand).t()
            if grad_bias is not None:
                grad_bias[lo:hi].addmv_(e.to(y.dtype), factor)
                if mass is not None:
                    grad_bias[lo:hi].addmv_(t.to(y.dtype), mass, alpha=-1)
            if grad_weight is None and grad_scale is None:
                continue
            d, rows = product[: hi - lo], factor[:, None] * y
            if self.operand == torch.float16:  # would flush 1e-8 to 0
                peak = rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
                _addmm(d, e, (rows / peak).to(self.operand), beta=0).mul_(peak)
            else:
                _addmm(d, e, rows.to(self.operand), beta=0)
            if mixed is not None:
                _addmm(d, t, mixed.to(self.target_operand), beta=1, alpha=-1)
            if grad_scale is not None:
                along = torch.mul(d, self.weight[lo:hi], out=self.scratch[: hi - lo])
                grad_scale[lo:hi].add_(along.sum(dim=-1))
            if grad_weight is not None:
                if self.scale is None:
                    grad_weight[lo:hi].add_(d)
                else:
                    grad_weight[lo:hi].addcmul_(d, self.scale[lo:hi, None])

    def zeros(self, needed: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Room for the gradients of weight, scale and bias."""
        k = self.weight.shape[:1]
        shapes = (self.weight.shape, k, k)
        made = [self.y.new_zeros(s) if n else None for s, n in zip(shapes, needed, strict=True)]
        return made[0], made[1], made[2]


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        pair_weights: Tensor,
        row_weights: Tensor,
        temperature: float,
        plan: _Plan,
        grad_enabled: bool,
    ) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
            prototypes_need = any(needs[1:])
            k, dim = weight.shape
            views = embeddings.to(pair_weights.dtype) / temperature
            y = views.reshape(-1, dim)
            kernel = _Kernel(y, weight, scale, bias, targets.reshape(-1, k), plan)
            mixed = torch.einsum("vq,n,vnp->qnp", pair_weights, row_weights, views)
            mixed = mixed.reshape(-1, dim)
            mass = (pair_weights.sum(0)[:, None] * row_weights).reshape(-1)
            sums = targets.sum(dim=-1, dtype=y.dtype)
            share = ((pair_weights @ sums) * row_weights).reshape(-1)  # a_i

            grads = kernel.zeros([n and not plan.keep for n in needs[1:]])
            rows = plan.rows if prototypes_need else len(y)
            stored = y.new_empty(k, rows, dtype=plan.stored) if prototypes_need else None
            mean = torch.zeros_like(y) if needs[0] else None
            target_mean = torch.zeros_like(mixed)
            value = y.new_zeros(())
            for lo in range(0, len(y), rows):
                block = slice(lo, min(lo + rows, len(y)))
                y_block, first = y[block], lo == 0
                room = None if stored is None else stored.view(-1)[: k * len(y_block)]
                room = None if room is None else room.view(k, -1)
                lse, shifts = kernel.normalize(
                    y_block,
                    room,
                    None if mean is None else mean[block],
                    target_mean if first else None,
                )
                value += torch.dot(share[block], lse)
                if room is not None:
                    factors = (shifts - lse).exp_().mul_(share[block])
                    if not plan.keep:
                        teacher = (mixed, mass) if first else (None, None)
                        kernel.add_prototype_gradients(grads, y_block, room, factors, *teacher)
            value -= torch.dot(mixed.view(-1), target_mean.view(-1))
            if bias is not None:
                value -= torch.dot(mass, torch.mv(kernel.targets.to(y.dtype), bias))

            grad_y = None
            if mean is not None:
                pulled = torch.einsum(
                    "vq,n,qnp->vnp",
                    pair_weights,
                    row_weights,
                    target_mean.view(-1, *views.shape[1:]),
                )
                grad_y = mean.mul_(share[:, None]).view_as(views).sub_(pulled).div_(temperature)
            ctx.plan, ctx.needs = plan, needs
            ctx.dtypes = [None if x is None else x.dtype for x in (embeddings, weight, scale, bias)]
            if stored is not None and plan.keep:
                ctx.save_for_backward(
                    grad_y, y, weight, scale, bias, kernel.targets, stored, factors, mixed, mass
                )
            else:
                ctx.save_for_backward(grad_y, *grads)
            return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):
            grad_y = ctx.saved_tensors[0]
            out = [None if grad_y is None else grad_y * grad]
            if ctx.plan.keep and any(ctx.needs[1:]):
                _, y, weight, scale, bias, targets, stored, factors, mixed, mass = ctx.saved_tensors
                kernel = _Kernel(y, weight, scale, bias, targets, ctx.plan)
                grads = kernel.zeros(ctx.needs[1:])
                kernel.add_prototype_gradients(
                    grads, y, stored, factors * grad, mixed * grad, mass * grad
                )
                out.extend(grads)
            else:
                out.extend(None if g is None else g * grad for g in ctx.saved_tensors[1:])
            cast = [
                None if g is None else g.to(dtype) for g, dtype in zip(out, ctx.dtypes, strict=True)
            ]
            return (*cast, *([None] * 6))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} = {meaning}")


def prototype_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Sum of soft-target cross-entropies between teacher targets and student prototype logits.

    ``logits[v, n, k] = scale_k <weight_k, embeddings[v, n]> / temperature + bias_k`` and the value is
    ``sum_vqn pair_weights[v, q] row_weights[n] CE(targets[q, n], logits[v, n])`` with
    ``CE(t, l) = -sum_k t_k log_softmax(l)_k`` (paper Eqs. 2 and 6; targets need not sum to 1).

    The logits are walked through in chunks of prototypes; the strategy and the sizes follow from the
    shapes. Sums, softmax and bias are float32 (float64 if an input is). Under autocast the products
    use its dtype with float32 accumulation, except on CPUs that do not multiply in it: these use
    float32, and keep only what waits for the backward pass in half precision.

    Args:
        embeddings: student rows ``(V, N, p)``, or ``(N, p)`` for one view.
        weight: ``(K, p)``, raw directions when ``scale`` is given.
        targets: teacher probabilities ``(Q, N, K)``, or ``(N, K)``; without gradient.
        temperature: student temperature, > 0.
        scale: ``(K,)``, factors of the rows of ``weight`` (``Prototypes.scale()``: g / ||v||).
        bias: ``(K,)``, e.g. the vMF log-normaliser.
        pair_weights: ``(V, Q)``, default ``1 / (V Q N)``: the mean over views, targets and rows.
            DINO: ``(v != q) / (number of such pairs * N)``. Without gradient.
        row_weights: ``(N,)``, default 1. Without gradient.

    Returns:
        Scalar, float32 (float64 if embeddings or weight are).

    Raises:
        ValueError: for shapes that do not fit, a temperature that is not positive, or targets or
            weights of pairs and rows that require a gradient.

    Example:
        >>> y = torch.nn.functional.normalize(torch.randn(12, 4, 8), dim=-1)
        >>> targets = torch.softmax(torch.randn(2, 4, 100), dim=-1)
        >>> pairs = 1 - torch.eye(12, 2)
        >>> loss = prototype_cross_entropy(
        ...     y, torch.randn(100, 8), targets, temperature=0.1, pair_weights=pairs / pairs.sum() / 4
        ... )
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """
    if embeddings.dim() == 2:
        embeddings = embeddings[None]
    if targets.dim() == 2:
        targets = targets[None]
    if embeddings.dim() != 3 or weight.dim() != 2 or targets.dim() != 3:
        raise ValueError(
            "prototype_cross_entropy needs embeddings (V, N, p), weight (K, p) and targets (Q, N, K), "
            f"got {tuple(embeddings.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    (v, n, p), (k, _), q = embeddings.shape, weight.shape, targets.shape[0]
    _check_shape("weight", weight, (k, p), "(K, p) with p from embeddings (V, N, p)")
    _check_shape("targets", targets, (q, n, k), "(Q, N, K) with N from embeddings, K from weight")
    _check_shape("scale", scale, (k,), "(K,)")
    _check_shape("bias", bias, (k,), "(K,)")
    _check_shape("pair_weights", pair_weights, (v, q), "(V, Q)")
    _check_shape("row_weights", row_weights, (n,), "(N,)")
    if min(v, n, p, k, q) == 0:
        raise ValueError(
            f"prototype_cross_entropy needs at least one of each, got V={v}, N={n}, p={p}, K={k}, Q={q}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive (DINO: 0.1)")
    fixed = {"targets": targets, "pair_weights": pair_weights, "row_weights": row_weights}
    for name, tensor in fixed.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient that is not computed here: detach it first"
            )

    double = torch.float64 in (embeddings.dtype, weight.dtype)
    dtype = torch.float64 if double else torch.float32
    product = dtype
    device = weight.device.type
    if not double and torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    elif embeddings.dtype == weight.dtype:
        product = weight.dtype
    plan = _choose_plan(weight, v * n, dtype, product)
    if pair_weights is None:
        pair_weights = weight.new_full((v, q), 1 / (v * q * n), dtype=dtype)
    if row_weights is None:
        row_weights = weight.new_ones(n, dtype=dtype)
    return _PrototypeCrossEntropy.apply(
        embeddings,
        weight,
        None if scale is None else scale.to(dtype),
        None if bias is None else bias.to(dtype),
        targets,
        pair_weights.to(dtype),
        row_weights.to(dtype),
        float(temperature),
        plan,
        torch.is_grad_enabled(),
    )
