"""The log-normalizer of all prototypes in one Triton kernel: value and slope, for CUDA devices.

Imported only where Triton is used (``prototypes.Prototypes.log_normalizer``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FusedLogNormalizer", "normalizer_kernel"]

jit: Any = triton.jit  # untyped
_BLOCK = 1024

if triton.knobs.runtime.interpret:

    @jit  # type: ignore[untyped-decorator]
    def _log1p(x):  # type: ignore[no-untyped-def]
        u = 1 + x
        return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))

else:
    from triton.language.extra import libdevice

    @jit  # type: ignore[untyped-decorator]
    def _log1p(x):  # type: ignore[no-untyped-def]
        return libdevice.log1p(x)


@jit  # type: ignore[untyped-decorator]
def normalizer_kernel(  # type: ignore[no-untyped-def]
    magnitude,  # (K,) signed norms g
    value,  # out (K,): D(g / tau)
    slope,  # out (K,): d D(g / tau) / d g
    K,
    temperature,
    nu,
    BLOCK: tl.constexpr,
):
    """The formula of ``vmf.log_normalizer``, order 0; D is even, so that g may be negative."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kappa = tl.load(magnitude + k, k < K, other=0.0) / temperature
    size = tl.abs(kappa)
    large, small = tl.maximum(size, nu), tl.minimum(size, nu)
    s = large * tl.sqrt(1 + (small / large) * (small / large))
    t = kappa * (kappa / (s + nu))
    tl.store(value + k, nu * _log1p(t / (2 * nu)) - t + 0.5 * _log1p(t / nu), k < K)
    tl.store(slope + k, (0.5 * (kappa / s) / s - kappa / (s + nu)) / temperature, k < K)


class FusedLogNormalizer(torch.autograd.Function):
    """``vmf.log_normalizer(|g| / tau, dim)`` of magnitudes ``g (K,)``, float32."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, temperature: float, dim: int) -> Tensor:  # type: ignore[override]
        """``D (K,)``."""
        magnitude = magnitude.float().contiguous()
        value, slope = torch.empty_like(magnitude), torch.empty_like(magnitude)
        count = magnitude.numel()
        normalizer_kernel[(math.ceil(count / _BLOCK),)](
            magnitude, value, slope, count, temperature, dim / 2 - 1, BLOCK=_BLOCK
        )
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Gradient of the magnitudes."""
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None
