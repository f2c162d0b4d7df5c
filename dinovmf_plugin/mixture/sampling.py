"""Random unit vectors from von Mises-Fisher components and mixtures: for tests and figures."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.mixture.model import VMFMixture

__all__ = ["sample_mixture", "sample_vmf"]


def sample_vmf(
    mean: Tensor, concentration: float, num: int, *, seed: int | np.random.Generator = 0
) -> Tensor:
    """Draw from one vMF distribution (``scipy.stats.vonmises_fisher``; uniform at concentration 0).

    Args:
        mean: mean direction ``(p,)``, normalized here; ``p >= 2``.
        concentration: ``kappa >= 0``.
        num: number of samples.
        seed: seed or numpy generator.

    Returns:
        float64 unit vectors ``(num, p)`` on the CPU.

    Raises:
        ValueError: for a mean that is no direction, or a negative concentration.

    Example:
        >>> y = sample_vmf(torch.tensor([0.0, 0.0, 1.0]), concentration=50.0, num=1000)
        >>> y.shape, bool(y.mean(dim=0)[2] > 0.97)
        (torch.Size([1000, 3]), True)
    """
    if mean.ndim != 1 or len(mean) < 2 or not float(mean.norm()) > 0:
        raise ValueError(f"mean of shape {tuple(mean.shape)} is no direction: give a non-zero (p,)")
    if not 0 <= concentration < float("inf"):
        raise ValueError(f"concentration={concentration} must be >= 0 and finite")
    generator = np.random.default_rng(seed)
    if concentration == 0:
        normal = torch.from_numpy(generator.standard_normal((num, len(mean))))
        return F.normalize(normal, dim=-1)
    unit = F.normalize(mean.detach().double().cpu(), dim=0).numpy()
    draws = stats.vonmises_fisher(unit, concentration).rvs(num, random_state=generator)
    return torch.from_numpy(np.asarray(draws).reshape(num, len(mean)))


def sample_mixture(mixture: VMFMixture, num: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw from a mixture: components by weight, then unit vectors.

    Args:
        mixture: the model.
        num: number of samples.
        seed: seed.

    Returns:
        float64 unit vectors ``(num, p)`` and their components ``(num,)``, int64.

    Example:
        >>> mixture = VMFMixture(torch.eye(3), torch.full((3,), 100.0), torch.zeros(3))
        >>> y, component = sample_mixture(mixture, 50)
        >>> bool((mixture.assign(y.float()) == component).all())
        True
    """
    generator = np.random.default_rng(seed)
    weights = mixture.log_weights.double().softmax(0).cpu().numpy()
    components = generator.choice(len(weights), size=num, p=weights / weights.sum())
    y = torch.empty(num, mixture.directions.shape[1], dtype=torch.float64)
    for k in np.unique(components):
        rows = components == k
        y[torch.from_numpy(rows)] = sample_vmf(
            mixture.directions[k],
            float(mixture.concentrations[k]),
            int(rows.sum()),
            seed=generator,
        )
    return y, torch.from_numpy(components)
