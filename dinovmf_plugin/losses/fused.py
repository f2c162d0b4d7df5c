"""The cross-entropy on NVIDIA GPUs: two Triton kernels, no logit outlives its tile.

The same sums as in ``streamed``, with the exponentials computed again in the backward pass instead
of kept for it: as in flash attention, whose values would be the prototypes themselves. ``DINOVMF_TRITON=0``
turns it off.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinovmf_plugin.core.triton_use import triton_serves
from dinovmf_plugin.losses.arithmetic import add_product
from dinovmf_plugin.losses.streamed import refuse_second_derivative

__all__ = ["FusedCrossEntropy", "Tiles", "serves"]

_LARGEST_DIM = 256
_SHARED_MEMORY = (
    135_168  # bytes of a multiprocessor that the tiles need: A100, H100 and later have them
)


def serves(weight: Tensor, operand: torch.dtype) -> bool:
    """Whether the fused path is used: bfloat16 products of up to 256 dimensions on a CUDA device.

    Products in float32 stay with cuBLAS, which is faster there than Triton's; float16 would flush the
    gradient's small factors to zero.
    """
    return (
        operand == torch.bfloat16
        and weight.shape[1] <= _LARGEST_DIM
        and triton_serves(weight)
        and _shared_memory(weight.device) >= _SHARED_MEMORY
    )


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, and among how many programs the prototypes of one tile of rows are shared.

    Attributes:
        rows: student rows of the first pass, ``BR``.
        prototypes: of the first pass, ``BK``.
        gradient_rows: student rows of the second pass.
        gradient_prototypes: of the second pass.
        teachers: teacher rows, ``BT``.
        programs: that keep a device busy.
        warps: of one program.
        stages: tiles that are on their way at once.

    The defaults are the largest whose accumulators stay in the registers of a multiprocessor of an H100
    at 256 dimensions: 8 warps, 219 and 248 registers, 131 and 132 KB of shared memory.
    """

    rows: int = 128
    prototypes: int = 64
    gradient_rows: int = 64
    gradient_prototypes: int = 64
    teachers: int = 32
    programs: int = 132
    warps: int = 8
    stages: tuple[int, int] = (2, 3)

    def shares(self, rows: int, prototypes: int) -> tuple[int, int]:
        """(number of shares, tiles of prototypes in each)."""
        tiles = math.ceil(prototypes / self.prototypes)
        wanted = max(self.programs // math.ceil(rows / self.rows), 1)
        each = math.ceil(tiles / min(wanted, tiles))
        return math.ceil(tiles / each), each


def _normalize(
    y: Tensor, w: Tensor, bias: Tensor | None, want_mean: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """``lse (R,)`` and ``sum_k softmax(l)_k w_k (R, P)``."""
    from dinovmf_plugin.losses import kernels

    (rows, dim), count = y.shape, len(w)
    shares, each = tiles.shares(rows, count)
    peaks = torch.empty(shares, rows, dtype=torch.float32, device=y.device)
    totals = torch.empty_like(peaks)
    means = peaks.new_empty(shares, rows, dim) if want_mean else peaks
    kernels.normalize_kernel[(math.ceil(rows / tiles.rows), shares)](
        y,
        w,
        peaks if bias is None else bias,
        peaks,
        totals,
        means,
        rows,
        count,
        dim,
        each,
        HAS_BIAS=bias is not None,
        MEAN=want_mean,
        PRECISION="ieee",
        BR=tiles.rows,
        BK=tiles.prototypes,
        BP=_power_of_two(dim),
        num_warps=tiles.warps,
        num_stages=tiles.stages[0],
    )
    peak = peaks.amax(dim=0)
    factors = (peaks - peak).exp_()
    total = (factors * totals).sum(dim=0)
    mean = torch.einsum("srp,sr->rp", means, factors / total) if want_mean else None
    return peak + total.log(), mean


def _power_of_two(dim: int) -> int:
    """The smallest that is at least ``dim``, and 16, the least of a product."""
    return max(16, 1 << (dim - 1).bit_length())


class FusedCrossEntropy(torch.autograd.Function):
    """As ``StreamedCrossEntropy``, on tensors of one CUDA device (or of Triton's interpreter)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        pair_weights: Tensor,
        row_weights: Tensor,
        temperature: float,
        normed: bool,
        operand: torch.dtype,
        tiles: Tiles,
        grad_enabled: bool,
    ) -> Tensor:
        """The scalar; arguments as in ``prototype_cross_entropy``, ``factor`` is scale or magnitude."""
        with torch.autocast(weight.device.type, enabled=False):
            needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
            k, dim = weight.shape
            views = embeddings.float() / temperature
            y = views.reshape(-1, dim)
            scale, norms = factor, None
            if normed and factor is not None:
                norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
                norms = norms.clamp_min_(1e-12)
                scale = factor / norms
            w = weight if scale is None else weight * scale[:, None]
            w = w.to(operand).contiguous()
            rows = y.to(operand).contiguous()
            bias = None if bias is None else bias.contiguous()
            t = targets.reshape(-1, k).contiguous()

            mixed = torch.einsum("vq,n,vnp->qnp", pair_weights, row_weights, views)
            mixed = mixed.reshape(-1, dim)
            mass = (pair_weights.sum(0)[:, None] * row_weights).reshape(-1)
            sums = targets.sum(dim=-1, dtype=torch.float32)
            share = ((pair_weights @ sums) * row_weights).reshape(-1)

            lse, mean = _normalize(rows, w, bias, needs[0], tiles)
            target_mean = add_product(torch.empty_like(mixed), t.to(operand), w, beta=0)
            value = torch.dot(share, lse) - torch.dot(mixed.view(-1), target_mean.view(-1))
            if bias is not None:
                value -= torch.dot(mass, torch.mv(t.float(), bias))

            grad_y = None
            if mean is not None:
                teacher = target_mean.view(targets.shape[0], -1, dim)
                pulled = torch.einsum("vq,n,qnp->vnp", pair_weights, row_weights, teacher)
                grad_y = mean.mul_(share[:, None]).view_as(views).sub_(pulled).div_(temperature)
            ctx.needs, ctx.tiles, ctx.normed = needs, tiles, normed
            ctx.dtypes = [
                None if x is None else x.dtype for x in (embeddings, weight, factor, bias)
            ]
            kept = (rows, w, bias, lse, share, t, mixed, mass, weight, scale, norms)
            ctx.save_for_backward(grad_y, *(kept if any(needs[1:]) else ()))
            return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the first four arguments."""
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            grad_y, *kept = ctx.saved_tensors
            out: list[Tensor | None] = [None if grad_y is None else grad_y * grad]
            out += _prototype_gradients(ctx, kept, grad) if kept else [None] * 3
            out = [
                g.to(dtype) if needed and g is not None else None
                for g, needed, dtype in zip(out, ctx.needs, ctx.dtypes, strict=True)
            ]
        return (*refuse_second_derivative(out), *([None] * 8))


def _prototype_gradients(ctx: Any, kept: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients of weight, factor and bias times ``grad``."""
    from dinovmf_plugin.losses import kernels

    rows, w, bias, lse, share, targets, mixed, mass, weight, scale, norms = kept
    (count, dim), tiles = w.shape, ctx.tiles
    grad_weight = torch.empty(count, dim, dtype=torch.float32, device=w.device)
    grad_factor, grad_bias = (None if x is None else lse.new_empty(count) for x in (scale, bias))
    unused = lse
    kernels.gradients_kernel[(math.ceil(count / tiles.gradient_prototypes),)](
        rows,
        w,
        unused if bias is None else bias,
        lse,
        share * grad,
        targets,
        (mixed * grad).to(w.dtype),
        mass * grad,
        weight.contiguous(),
        unused if scale is None else scale,
        unused if norms is None else norms,
        grad_weight,
        unused if grad_factor is None else grad_factor,
        unused if grad_bias is None else grad_bias,
        len(rows),
        count,
        dim,
        len(targets),
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        NORMED=norms is not None,
        PRECISION="ieee",
        BR=tiles.gradient_rows,
        BK=tiles.gradient_prototypes,
        BP=_power_of_two(dim),
        BT=tiles.teachers,
        num_warps=tiles.warps,
        num_stages=tiles.stages[1],
    )
    return [grad_weight, grad_factor, grad_bias]
