"""The von Mises-Fisher distribution on the unit sphere: pure functions.

The density of a unit vector ``y`` in ``p`` dimensions is ``C_p(kappa) exp(kappa <mu, y>)`` with

    log C_p(kappa) = nu log kappa - (p / 2) log(2 pi) - log I_nu(kappa),        nu = p / 2 - 1.

Softmax and centering are invariant to a constant, so training uses the offset-free
``D(kappa) = log C_p(kappa) - log C_p(0)``: zero at ``kappa = 0``, even and decreasing in ``|kappa|``.

References:
    - DINO as a von Mises-Fisher mixture model, ICLR 2023, arXiv 2405.10939: Eqs. 5-7 and A.2.
    - DLMF 10.41.3 and 10.41.10: the uniform expansion of ``I_nu`` and its polynomials ``U_k``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

__all__ = [
    "exact_log_normalizer",
    "expands",
    "log_density",
    "log_normalizer",
    "mean_resultant_length",
]

_ORDERS = (0, 1, 2)

_EXACT_BELOW = 16
"""Dimension from which the slope of the paper's order is right within 2 %; below it D is exact."""

_TALL = 48
"""Steps up in ``nu`` from which the second-order expansion is right to 2e-8 (see ``_by_recurrence``)."""


def _debye_polynomials(s: Tensor, order: int) -> list[Tensor]:
    """``U_1(s) .. U_order(s)`` of DLMF 10.41.10."""
    s2 = s * s
    polynomials = [s * (3 - 5 * s2) / 24, s2 * (81 - s2 * (462 - 385 * s2)) / 1152]
    return polynomials[:order]


def _log_series(polynomials: list[Tensor], nu: float) -> Tensor:
    """``log(1 + U_1 / nu + U_2 / nu^2 ..)``."""
    terms = torch.stack([u / nu ** (i + 1) for i, u in enumerate(polynomials)])
    return torch.log1p(terms.sum(dim=0))


def _as_float(kappa: Tensor) -> Tensor:
    """Half precision cannot hold D (bf16 spacing is 2 near 344): compute in float32 or float64."""
    return kappa if kappa.dtype == torch.float64 else kappa.float()


def _check_dim(dim: int) -> float:
    if dim < 3:
        raise ValueError(
            f"dim={dim} is too small for the uniform expansion of the vMF normalizer, which needs "
            "nu = dim / 2 - 1 > 0: use dim >= 3 (the paper uses 256), or exact_log_normalizer"
        )
    return dim / 2 - 1


def _expansion(kappa: Tensor, nu: float, order: int) -> Tensor:
    """``D(kappa)`` by the uniform expansion; float32 or float64."""
    # torch.hypot keeps kappa^2 from overflowing; its gradient at 0 is finite because nu > 0
    s = torch.hypot(kappa, torch.full_like(kappa, nu))
    t = kappa * (kappa / (s + nu))
    out = nu * torch.log1p(t / (2 * nu)) - t + 0.5 * torch.log1p(t / nu)
    if order:
        at_kappa = _debye_polynomials(nu / s, order)
        at_zero = _debye_polynomials(torch.ones_like(s), order)
        out = out - _log_series(at_kappa, nu) + _log_series(at_zero, nu)
    return out


def _expansion_slope(kappa: Tensor, nu: float) -> Tensor:
    """``-dD / d kappa``, the ratio ``I_{nu+1} / I_nu``, by the second-order expansion."""
    s = torch.hypot(kappa, torch.full_like(kappa, nu))
    t = nu / s
    series = sum(u / nu ** (i + 1) for i, u in enumerate(_debye_polynomials(t, 2)))
    slopes = ((1 - 5 * t**2) / 8, t * (81 - t**2 * (924 - 1155 * t**2)) / 576)
    slope = sum(u / nu ** (i + 1) for i, u in enumerate(slopes))
    return kappa / (nu + s) - kappa / s / (2 * s) - nu * (kappa / s) / s**2 * slope / (1 + series)


def _by_recurrence(kappa: Tensor, nu: float) -> Tensor:
    """``D(kappa)`` in few dimensions, right to 2e-8 with its gradient; computed in float64.

    With ``q_n = kappa I_{n+1}(kappa) / I_n(kappa)`` (DLMF 10.29.1, 10.33.1)

        D_n = D_{n+1} - log1p(q_{n+1} / (2 (n + 1))),        q_n = kappa^2 / (2 (n + 1) + q_{n+1}),

    begun high above ``nu``, where the expansion and its slope are as good as exact.
    """
    x = kappa.double()
    top = nu + _TALL
    out, q = _expansion(x, top, 2), x * _expansion_slope(x, top)
    for step in range(_TALL, 0, -1):
        n = nu + step
        out = out - torch.log1p(q / (2 * n))
        q = x * (x / (2 * n + q))
    return out.to(kappa.dtype)


def expands(dim: int) -> bool:
    """Whether ``log_normalizer`` is the paper's expansion in this dimension, not the exact recurrence."""
    return dim >= _EXACT_BELOW


def log_normalizer(kappa: Tensor, dim: int, *, order: int = 0) -> Tensor:
    """``D(kappa) = log C_p(kappa) - log C_p(0)``, differentiable: by the uniform expansion, or exact.

    With ``s = sqrt(nu^2 + kappa^2)`` and ``t = kappa^2 / (s + nu)`` the paper's first-term expansion
    (Eq. 5 with ``U_0 = 1``) is, without cancellation,
    ``D = nu log1p(t / (2 nu)) - t + log1p(t / nu) / 2``; it is smooth at ``kappa = 0``.

    Below 16 dimensions, where its slope is wrong by up to 500 % (at ``dim=3`` it grows with ``kappa``), the
    exact value is taken instead, from a recurrence over ``nu``, whatever the order.

    Args:
        kappa: concentrations of any shape; even in ``kappa``. Half precision is computed and
            returned in float32, with autocast off.
        dim: dimension ``p`` of the sphere's space, at least 3.
        order: 0 is the paper; 1 and 2 add the Debye terms ``U_1 / nu`` and ``U_2 / nu^2``
            (at ``dim=256`` and ``kappa <= 2000`` the worst errors in float64 are about 1e-3, 2e-6 and 1e-8;
            float32 adds its rounding, 4e-6 at ``kappa = 100`` and 3e-4 at ``kappa = 2000``).

    Returns:
        Tensor of kappa's shape, float32 (float64 if kappa is).

    Raises:
        ValueError: if ``dim < 3`` or ``order`` is not 0, 1 or 2.

    Example:
        >>> kappa = torch.tensor([0.0, 10.0, 100.0])
        >>> [round(v, 3) for v in log_normalizer(kappa, 256).tolist()]
        [0.0, -0.195, -18.286]

    Differs from upstream: the paper evaluates ``log C_p`` itself; only differences between
    components matter, and the offset-free form has no cancellation: in float32 its relative error is
    that of a few roundings at any kappa.
    """
    nu = _check_dim(dim)
    if order not in _ORDERS:
        raise ValueError(f"order={order} is not available: choose one of {_ORDERS}")
    with torch.autocast(kappa.device.type, enabled=False):
        kappa = _as_float(kappa)
        return _by_recurrence(kappa, nu) if dim < _EXACT_BELOW else _expansion(kappa, nu, order)


def mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """``A_p(kappa) = I_{p/2}(kappa) / I_{p/2-1}(kappa)``, the length of the mean of a vMF.

    It is ``-d log C_p / d kappa``: the gradient of ``log_normalizer`` is ``-A_p``. Uses Gauss'
    continued fraction, so it holds for every ``dim >= 2``, without overflow, and is differentiable
    through ``A' = 1 - A^2 - (p - 1) A / kappa``.

    Args:
        kappa: concentrations of any shape, any sign (odd in ``kappa``).
        dim: dimension ``p``, at least 2.

    Returns:
        Tensor of kappa's shape in (-1, 1), float32 (float64 if kappa is).

    Raises:
        ValueError: if ``dim < 2``.

    Example:
        >>> round(float(mean_resultant_length(torch.tensor(100.0), 256)), 3)
        0.345
    """
    if dim < 2:
        raise ValueError(f"dim={dim} is not the dimension of a sphere's space: use dim >= 2")
    return _MeanResultantLength.apply(_as_float(kappa), dim)


class _MeanResultantLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kappa: Tensor, dim: int) -> Tensor:  # type: ignore[no-untyped-def]
        x = kappa.detach().double().cpu().numpy()
        value = torch.from_numpy(np.asarray(_bessel_ratio(x, dim / 2 - 1)))
        out = value.to(device=kappa.device, dtype=kappa.dtype)
        ctx.save_for_backward(kappa, out)
        ctx.dim = dim
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        kappa, a = ctx.saved_tensors
        small = kappa.abs() < 1e-4
        safe = torch.where(small, torch.ones_like(kappa), kappa)
        slope = 1 - a * a - (ctx.dim - 1) * a / safe
        return grad * torch.where(small, torch.full_like(a, 1 / ctx.dim), slope), None


def _bessel_ratio(kappa: NDArray[np.float64], nu: float) -> NDArray[np.float64]:
    """``I_{nu+1} / I_nu`` in float64: backward recurrence from a tight bound high above ``nu``.

    ``r_n = I_{n+1}/I_n`` obeys ``r_{n-1} = 1 / (2 n / kappa + r_n)``; the recurrence contracts in
    this direction, so the start (Amos' bound) is forgotten.
    """
    x = np.abs(kappa)
    usual = (x > 0) & np.isfinite(x)
    safe = np.where(usual, x, 1.0)
    steps = 64 + int(4 * math.sqrt(float(safe.max(initial=0.0))))
    n = nu + steps
    r = safe / (n + 0.5 + np.sqrt((n + 1.5) ** 2 + safe**2))
    for i in range(steps, 0, -1):
        r = safe / (2 * (nu + i) + safe * r)
    return np.sign(kappa) * np.where(usual, r, 1.0)  # 0, 1 and NaN at 0, infinity and NaN


def exact_log_normalizer(kappa: ArrayLike, dim: int) -> NDArray[np.float64]:
    """``log C_p(kappa) - log C_p(0)`` from scipy's Bessel function: the reference, not for training.

    Uses ``scipy.special.ive`` where it does not underflow; below that the ascending series of
    ``I_nu`` (DLMF 10.25.2), which converges quickly because ``kappa^2 / nu`` is then small.

    Args:
        kappa: non-negative concentrations in [0, 1e5].
        dim: dimension ``p``, 2 to 4096.

    Returns:
        float64 array of kappa's shape, always finite.

    Raises:
        ValueError: if ``dim < 2`` or a concentration is negative or not finite.

    Example:
        >>> exact_log_normalizer([10.0, 100.0], 256).round(4).tolist()
        [-0.1952, -18.2862]
    """
    if dim < 2:
        raise ValueError(f"dim={dim} is not the dimension of a sphere's space: use dim >= 2")
    x = np.asarray(kappa, dtype=np.float64)
    if not np.all(np.isfinite(x)) or np.any(x < 0):
        raise ValueError("kappa has negative or non-finite values: concentrations are >= 0")
    nu = dim / 2 - 1
    with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
        bessel = special.ive(nu, x)
        large = nu * np.log(x / 2) - special.gammaln(nu + 1) - np.log(bessel) - x
    # log1p(0) is 0.0 but its negative is -0.0, which prints badly: subtract from 0.0 instead
    use_series = (bessel < 1e-250) | (x < 1.0)
    small = 0.0 - _log_bessel_series(np.where(use_series, x, 0.0), nu)
    return np.where(use_series, small, large)


def _log_bessel_series(x: NDArray[np.float64], nu: float) -> NDArray[np.float64]:
    """``log(Gamma(nu+1) (2/x)^nu I_nu(x)) = log(1 + sum_{j>=1} (x^2/4)^j / (j! (nu+1)_j))``.

    At dimension 4096 the sum leaves float64 before ``ive`` enters it: it is scaled down on the way.
    """
    quarter = x * x / 4
    term = np.ones_like(x)
    total = np.zeros_like(x)
    log_scale = np.zeros_like(x)
    j = 1
    while True:
        term = term * quarter / (j * (nu + j))
        total = total + term
        if np.all(term <= 1e-17 * (1 + total)):
            return np.where(
                log_scale > 0, log_scale + np.log(np.maximum(total, 1.0)), np.log1p(total)
            )
        shrink = np.where(total > 1e100, 1e-100, 1.0)
        term, total = term * shrink, total * shrink
        log_scale = log_scale - np.log(shrink)
        j += 1


def log_density(y: Tensor, mean: Tensor, kappa: Tensor) -> Tensor:
    """Log-density of a vMF with respect to the sphere's surface measure (paper section 3.2).

    Uses ``exact_log_normalizer``: for analysis and figures, without gradient through ``kappa``.

    Args:
        y: unit vectors ``(..., p)``.
        mean: unit mean directions, broadcastable to y.
        kappa: concentrations >= 0, broadcastable to y's leading shape.

    Returns:
        Log-densities of the broadcast leading shape, float64.

    Example:
        >>> y = torch.tensor([[1.0, 0.0, 0.0]])
        >>> uniform = log_density(y, y, torch.tensor([0.0]))
        >>> bool(torch.isclose(uniform.exp(), torch.tensor(1 / (4 * math.pi)).double()).all())
        True
    """
    dim = y.shape[-1]
    log_area = math.log(2.0) + (dim / 2) * math.log(math.pi) - math.lgamma(dim / 2)
    offset = exact_log_normalizer(kappa.detach().cpu().numpy(), dim) - log_area
    cosine = (y.double() * mean.double()).sum(-1)
    return kappa.double() * cosine + torch.as_tensor(offset).to(cosine.device)
