"""Expectation-maximization for mixtures of von Mises-Fisher distributions: pure functions.

The model is ``p(x) = sum_k pi_k C_p(kappa_k) exp(kappa_k <mu_k, x>)`` for unit vectors ``x``. With
responsibilities ``r_nk`` everything that the M step needs is ``n_k = sum_n r_nk`` and
``s_k = sum_n r_nk x_n``:

    pi_k = n_k / N        mu_k = s_k / ||s_k||        A_p(kappa_k) = ||s_k|| / n_k

Log-densities in here are relative to the uniform distribution, so that nothing large cancels.

Source: Banerjee, Dhillon, Ghosh and Sra, *Clustering on the unit hypersphere using von Mises-Fisher
distributions*, JMLR 6 (2005), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinovmf_plugin.core.vmf import exact_log_normalizer
from dinovmf_plugin.mixture.concentration import MAX_CONCENTRATION, invert_mean_resultant_length

__all__ = [
    "Parameters",
    "Statistics",
    "chunk_rows",
    "component_offsets",
    "hard_statistics",
    "log_joint",
    "maximization",
    "sufficient_statistics",
]

# Numbers that one chunk of rows and its scores may hold: 8 MB in float32. Larger ones are no faster.
_CHUNK_NUMBERS = 1 << 21


@dataclass(frozen=True)
class Parameters:
    """A mixture's parameters.

    Attributes:
        directions: unit mean directions ``mu_k`` ``(K, p)``, float64 (in training: float32), as the others.
        concentrations: ``kappa_k >= 0`` ``(K,)``.
        log_weights: log proportions ``(K,)``; they sum to 1 in probability.
    """

    directions: Tensor
    concentrations: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of some rows under one set of parameters; ``+`` joins those of other rows.

    Attributes:
        counts: ``n_k = sum_n r_nk`` ``(K,)``, float64.
        sums: ``s_k = sum_n r_nk x_n`` ``(K, p)``, float64.
        log_likelihood: ``sum_n log p(x_n)`` relative to the uniform density, float64 scalar.
        rows: number of rows.

    Example:
        >>> one = Statistics(torch.ones(1), torch.ones(1, 3), torch.tensor(0.5), 1)
        >>> (one + one).counts, (one + one).rows
        (tensor([2.]), 2)
    """

    counts: Tensor
    sums: Tensor
    log_likelihood: Tensor
    rows: float

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.counts + other.counts,
            self.sums + other.sums,
            self.log_likelihood + other.log_likelihood,
            self.rows + other.rows,
        )

    def weighted(self, weight: float) -> Statistics:
        """The same rows, each of which counts ``weight`` times."""
        return Statistics(
            self.counts * weight,
            self.sums * weight,
            self.log_likelihood * weight,
            self.rows * weight,
        )


def chunk_rows(num_components: int, dim: int) -> int:
    """Rows that are handled at once, so that no chunk and none of its scores exceeds 2**21 numbers.

    Example:
        >>> chunk_rows(4096, 256), chunk_rows(10**8, 256)
        (481, 1)
    """
    return max(_CHUNK_NUMBERS // (num_components + dim), 1)


def component_offsets(parameters: Parameters) -> Tensor:
    """``log pi_k + log C_p(kappa_k) - log C_p(0)`` with the exact normalizer, ``(K,)`` in float64."""
    kappa = parameters.concentrations
    normalizer = exact_log_normalizer(kappa.cpu().numpy(), parameters.directions.shape[1])
    return torch.from_numpy(normalizer).to(kappa.device) + parameters.log_weights


def log_joint(x: Tensor, parameters: Parameters, offsets: Tensor | None = None) -> Tensor:
    """``log pi_k f(x_n; mu_k, kappa_k)`` relative to the uniform density.

    Args:
        x: unit vectors ``(N, p)``, float32 or float64.
        parameters: the mixture.
        offsets: what ``component_offsets`` returned, where it is at hand already.

    Returns:
        ``(N, K)`` in x's dtype; its log-sum-exp over the components is ``log p(x_n)``, its softmax the
        responsibilities.

    Example:
        >>> e = torch.eye(3, dtype=torch.float64)
        >>> mixture = Parameters(e[:2], torch.full((2,), 20.0).double(), torch.zeros(2).double())
        >>> log_joint(e, mixture).softmax(dim=1).round(decimals=3)[2].tolist()
        [0.5, 0.5]
    """
    offsets = component_offsets(parameters) if offsets is None else offsets
    return torch.addmm(offsets.to(x.dtype), x, _weight(parameters, x.dtype))


def _weight(parameters: Parameters, dtype: torch.dtype) -> Tensor:
    """``kappa_k mu_k`` as columns."""
    return (parameters.directions * parameters.concentrations.unsqueeze(1)).to(dtype).T


def sufficient_statistics(
    chunks: Iterable[Tensor], parameters: Parameters, offsets: Tensor | None = None
) -> Statistics:
    """The E step: responsibilities of all rows, summed up chunk by chunk.

    Args:
        chunks: unit vectors ``(rows, p)``, float32 or float64 (all alike), one chunk after the other.
        parameters: the mixture.
        offsets: ``log pi_k + log C_p(kappa_k) - log C_p(0)``; default: exact, from ``component_offsets``.

    Returns:
        Statistics in the parameters' dtype, whatever that of the rows.
    """
    counts = torch.zeros_like(parameters.concentrations)
    sums = torch.zeros_like(parameters.directions)
    total = torch.zeros((), dtype=torch.float64, device=counts.device)
    rows = 0
    offsets = component_offsets(parameters) if offsets is None else offsets
    weight: Tensor | None = None
    for x in chunks:
        weight = _weight(parameters, x.dtype) if weight is None else weight
        joint = torch.addmm(offsets.to(x.dtype), x, weight)
        peak = joint.max(dim=1, keepdim=True).values
        # in place, by one exponential; what is below exp(-60) is nothing, and as subnormal numbers it would
        # cost most of the time
        responsibilities = torch.threshold_(joint.sub_(peak), -60.0, -torch.inf).exp_()
        mass = responsibilities.sum(dim=1, keepdim=True)
        responsibilities.div_(mass)
        counts += responsibilities.sum(dim=0, dtype=torch.float64)
        sums += responsibilities.T @ x
        total += (peak + mass.log()).sum(dtype=torch.float64)
        rows += len(x)
        del joint, responsibilities  # before the next chunk is made
    return Statistics(counts, sums, total, rows)


def hard_statistics(chunks: Iterable[Tensor], directions: Tensor) -> Statistics:
    """Statistics of rows that belong wholly to the direction of largest cosine, as in k-means.

    Args:
        chunks: unit vectors ``(rows, p)``.
        directions: unit vectors ``(K, p)``.

    Returns:
        Statistics whose ``log_likelihood`` holds the sum of the largest cosines instead.
    """
    counts = torch.zeros(len(directions), dtype=torch.float64, device=directions.device)
    sums = torch.zeros_like(directions, dtype=torch.float64)
    total = counts.new_zeros(())
    rows = 0
    for x in chunks:
        cosine, nearest = (x @ directions.to(x.dtype).T).max(dim=1)
        counts.index_add_(0, nearest, torch.ones_like(nearest, dtype=torch.float64))
        sums.index_add_(0, nearest, x.double())
        total += cosine.sum(dtype=torch.float64)
        rows += len(x)
    return Statistics(counts, sums, total, rows)


def maximization(
    statistics: Statistics,
    previous: Tensor,
    *,
    max_concentration: float = MAX_CONCENTRATION,
) -> Parameters:
    """The M step: the parameters that maximize the expected log-likelihood of the statistics.

    Args:
        statistics: of at least one row.
        previous: directions ``(K, p)`` that components keep whose mean resultant is zero.
        max_concentration: upper bound of the concentrations.

    Returns:
        Parameters. A component that no row belongs to keeps its direction, has concentration 0 and a
        proportion that is the smallest positive number.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> fitted = maximization(hard_statistics([x], x[:1]), x[:1])
        >>> fitted.directions.round(decimals=4).tolist(), fitted.concentrations.round(decimals=4)
        ([[0.7071, 0.7071, 0.0]], tensor([3.3878], dtype=torch.float64))
    """
    dim = statistics.sums.shape[1]
    norms = statistics.sums.norm(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    counts = statistics.counts
    moved = (norms > 0).unsqueeze(1)
    directions = torch.where(
        moved, statistics.sums / norms.clamp_min(tiny).unsqueeze(1), previous.double()
    )
    lengths = torch.where(counts > 0, norms / counts.clamp_min(tiny), torch.zeros_like(norms))
    concentrations = invert_mean_resultant_length(lengths, dim, maximum=max_concentration)
    log_weights = counts.clamp_min(tiny).log() - counts.sum().log()
    return Parameters(directions, concentrations, log_weights)
