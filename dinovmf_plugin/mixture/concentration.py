"""Concentrations from mean resultant lengths: the inverse of ``A_p``."""

from __future__ import annotations

import torch
from torch import Tensor

from dinovmf_plugin.core.vmf import mean_resultant_length

__all__ = ["MAX_CONCENTRATION", "banerjee_concentration", "invert_mean_resultant_length"]

MAX_CONCENTRATION = 1e5
_STEPS = 40


def banerjee_concentration(length: Tensor, dim: int) -> Tensor:
    """Approximate ``A_p^-1`` by ``r (p - r^2) / (1 - r^2)``.

    Source: Banerjee, Dhillon, Ghosh and Sra, JMLR 6 (2005), Eq. 4.4.

    Args:
        length: mean resultant lengths in [0, 1], of any shape.
        dim: dimension ``p``, at least 2.

    Returns:
        Concentrations of length's shape and dtype; infinite where the length is 1.

    Example:
        >>> banerjee_concentration(torch.tensor([0.0, 0.5]), 3).tolist()
        [0.0, 1.8333333730697632]
    """
    squared = length * length
    return length * (dim - squared) / (1 - squared)


def invert_mean_resultant_length(
    length: Tensor, dim: int, *, maximum: float = MAX_CONCENTRATION
) -> Tensor:
    """``kappa`` with ``A_p(kappa) = length``: the maximum-likelihood concentration.

    Newton steps with ``A' = 1 - A^2 - (p - 1) A / kappa`` from Banerjee's approximation. ``A_p`` is
    concave, so that from the second iterate on they come from below and never overshoot. The
    log-likelihood is concave in ``kappa`` too: cut off at ``maximum`` it is still the best there is.

    Args:
        length: mean resultant lengths, of any shape; rounding above 1 is allowed.
        dim: dimension ``p``, at least 2.
        maximum: upper bound of the concentrations, which a length of 1 (a single point) would exceed.

    Returns:
        float64 concentrations in [0, maximum] of length's shape, on its device.

    Raises:
        ValueError: if a length is negative or not a number, or the bound is not positive and finite.

    Example:
        >>> kappa = torch.tensor([5.0, 100.0, 500.0], dtype=torch.float64)
        >>> invert_mean_resultant_length(mean_resultant_length(kappa, 256), 256).round(decimals=6)
        tensor([  5., 100., 500.], dtype=torch.float64)
    """
    if not 0 < maximum < float("inf"):
        raise ValueError(f"maximum={maximum} must be positive and finite")
    r = length.detach().double()
    if not bool((r >= 0).all()):
        raise ValueError("a mean resultant length is negative or NaN: it must lie in [0, 1]")
    bound = mean_resultant_length(torch.tensor(maximum, dtype=torch.float64), dim).to(r.device)
    inside = (r > 0) & (r < bound)
    if not bool(inside.any()):
        return torch.where(r >= bound, maximum, 0.0)
    target = r[inside]
    kappa = banerjee_concentration(target, dim).clamp(max=maximum)
    for _ in range(_STEPS):
        a = mean_resultant_length(kappa, dim)
        slope = 1 - a * a - (dim - 1) * a / kappa
        # for kappa << 1 the slope is a difference of almost equal numbers; its limit is 1 / p
        slope = torch.where(kappa < 1e-4, torch.full_like(slope, 1 / dim), slope)
        step = (target - a) / slope
        kappa = (kappa + step).clamp(kappa / 8, kappa * 8).clamp(max=maximum)
        if bool((step.abs() <= 1e-10 * kappa).all()):
            break
    out = torch.where(r >= bound, maximum, torch.zeros_like(r))
    out[inside] = kappa
    return out
