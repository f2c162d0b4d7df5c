"""The prototypes as a mixture model of unit vectors that can be applied to images.

``p(y) = sum_k pi_k C_p(kappa_k) exp(kappa_k <mu_k, y>)`` with ``mu_k`` the prototypes' directions and
``kappa_k = ||w_k|| / tau`` (paper sections 3.2 and 3.3). What the mixture proportions ``pi`` are is a
choice, since training fixes the assignments only:

* ``model_log_weights``: those under which the responsibilities equal the model's own softmax. They are
  uniform for ``vmf`` and ``l2``; plain DINO leaves the normalizer out of its logits, which as a mixture
  means ``pi_k ~ 1 / C_p(kappa_k)``;
* uniform weights whatever the normalization;
* ``center_log_weights``: usage as estimated by the center (A.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import exact_log_normalizer

__all__ = [
    "ImageScores",
    "VMFMixture",
    "center_log_weights",
    "log_uniform_density",
    "model_log_weights",
    "prototype_mixture",
    "typicality",
]

_ROWS = 128


def log_uniform_density(dim: int) -> float:
    """Log-density of the uniform distribution on the unit sphere in ``dim`` dimensions.

    Example:
        >>> math.isclose(math.exp(log_uniform_density(3)), 1 / (4 * math.pi))
        True
    """
    return math.lgamma(dim / 2) - math.log(2.0) - dim / 2 * math.log(math.pi)


@dataclass(frozen=True)
class ImageScores:
    """What the mixture says about each image; every field has one entry per image, on the CPU.

    Attributes:
        component: most responsible component, int64.
        responsibility: its probability, float32.
        entropy: entropy of all responsibilities in nats; 0 if one component takes all.
        cosine: cosine with the component's mean direction.
        concentration: the component's ``kappa``.
        log_likelihood: ``log p(y)`` with respect to the sphere's surface measure, float64; the
            density of a uniform distribution is ``log_uniform_density(p)``.
    """

    component: Tensor
    responsibility: Tensor
    entropy: Tensor
    cosine: Tensor
    concentration: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True)
class VMFMixture:
    """A mixture of von Mises-Fisher components.

    Normalizers are exact (``vmf.exact_log_normalizer``); inner products are float32, a few rows at a
    time, so that K 65536 costs 34 MB and not N * K numbers.

    Attributes:
        directions: unit mean directions ``(K, p)``.
        concentrations: ``kappa`` ``(K,)``, >= 0.
        log_weights: log mixture proportions ``(K,)``, up to a constant (normalized in use).

    Example:
        >>> mixture = VMFMixture(torch.eye(3), torch.full((3,), 20.0), torch.zeros(3))
        >>> y = torch.tensor([[1.0, 0.0, 0.0], [0.577, 0.577, 0.577]])
        >>> mixture.responsibilities(y).round(decimals=3)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.3330, 0.3330, 0.3330]])
    """

    directions: Tensor
    concentrations: Tensor
    log_weights: Tensor

    def __post_init__(self) -> None:
        num, dim = self.directions.shape
        for name in ("concentrations", "log_weights"):
            shape = tuple(getattr(self, name).shape)
            if shape != (num,):
                raise ValueError(f"{name} have shape {shape}, but there are {num} directions")
        object.__setattr__(self, "directions", F.normalize(self.directions.detach().float(), dim=1))
        kappa = self.concentrations.detach().float()
        offset = torch.from_numpy(exact_log_normalizer(kappa.double().cpu().numpy(), dim))
        offset = offset.to(kappa.device) + self.log_weights.detach().double().log_softmax(0)
        object.__setattr__(self, "concentrations", kappa)
        object.__setattr__(self, "_offset", offset.float())

    def _log_joint(self, y: Tensor) -> Tensor:
        """``log pi_k f(y; mu_k, kappa_k) - log_uniform_density``, ``(rows, K)``."""
        offset: Tensor = getattr(self, "_offset")  # noqa: B009 (set in __post_init__)
        y = F.normalize(y.to(self.directions).float(), dim=-1)
        with torch.autocast(y.device.type, enabled=False):
            return torch.addcmul(offset, y @ self.directions.T, self.concentrations)

    def _blocks(self, y: Tensor) -> Iterator[Tensor]:
        if y.ndim != 2 or y.shape[1] != self.directions.shape[1]:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: (N, {self.directions.shape[1]}) is needed"
            )
        yield from y.detach().split(_ROWS)

    @torch.no_grad()
    def responsibilities(self, y: Tensor) -> Tensor:
        """Posterior probabilities of the components (Eq. 2), ``(N, p) -> (N, K)``, float32."""
        return torch.cat([self._log_joint(rows).softmax(dim=-1) for rows in self._blocks(y)])

    @torch.no_grad()
    def assign(self, y: Tensor) -> Tensor:
        """Most responsible component of each row, ``(N, p) -> (N,)``, int64."""
        return torch.cat([self._log_joint(rows).argmax(dim=-1) for rows in self._blocks(y)])

    @torch.no_grad()
    def log_likelihood(self, y: Tensor) -> Tensor:
        """``log p(y)`` with respect to the surface measure, ``(N, p) -> (N,)``, float64."""
        logs = [self._log_joint(rows).logsumexp(dim=-1) for rows in self._blocks(y)]
        return torch.cat(logs).double() + log_uniform_density(self.directions.shape[1])

    @torch.no_grad()
    def score(self, y: Tensor) -> ImageScores:
        """Everything in one pass over the components; see ``ImageScores``."""
        parts: list[tuple[Tensor, ...]] = []
        for rows in self._blocks(y):
            joint = self._log_joint(rows)
            total = joint.logsumexp(dim=-1, keepdim=True)
            log_r = joint - total
            best, component = log_r.max(dim=-1)
            entropy = -(log_r.exp() * log_r.clamp_min(-1e4)).sum(dim=-1)
            unit = F.normalize(rows.to(self.directions).float(), dim=-1)
            cosine = (unit * self.directions[component]).sum(dim=-1)
            parts.append((component, best.exp(), entropy, cosine, total.squeeze(-1)))
        component, responsibility, entropy, cosine, log_p = (
            torch.cat(column).cpu() for column in zip(*parts, strict=True)
        )
        return ImageScores(
            component=component,
            responsibility=responsibility,
            entropy=entropy.clamp_min(0),
            cosine=cosine,
            concentration=self.concentrations.cpu()[component],
            log_likelihood=log_p.double() + log_uniform_density(self.directions.shape[1]),
        )


def model_log_weights(prototypes: Prototypes, temperature: float) -> Tensor:
    """Log-weights ``(K,)`` with which the mixture's responsibilities equal the model's softmax.

    Zero (uniform) for ``vmf`` and ``l2``. For ``none`` they cancel the normalizer, ``-D(kappa_k)``.
    """
    kappa = prototypes.concentration(temperature).detach()
    if prototypes.normalization != "none":
        return torch.zeros_like(kappa, dtype=torch.float64)
    offset = exact_log_normalizer(kappa.double().cpu().numpy(), prototypes.dim)
    return -torch.from_numpy(offset).to(kappa.device)


def center_log_weights(
    center: Tensor,
    *,
    centering: str,
    normalization: str,
    temperature: float,
    raw_scores: bool = False,
) -> Tensor:
    """Log of the component usage that a training center estimates (A.4), ``(K,)``, float64.

    ``exp(c)`` for probability centering; ``exp(c / tau)`` for logit centering, whose center averages
    raw scores, except with ``vmf`` (without ``raw_scores``), where it averages logits and no
    temperature is left. It is what the targets of training are divided by.

    Args:
        center: the center, ``(K,)`` or ``(1, K)``.
        centering: ``probability`` or ``logit``.
        normalization: that of the prototypes.
        temperature: the teacher's ``tau``.
        raw_scores: ``center_raw_scores`` of training: ``vmf`` with a center of raw scores.

    Raises:
        ValueError: if there is no usage in the center (Sinkhorn).

    Example:
        >>> c = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> settings = {"normalization": "vmf", "temperature": 0.04}
        >>> center_log_weights(c, centering="probability", **settings).exp().round(decimals=3)
        tensor([0.7000, 0.2000, 0.1000], dtype=torch.float64)
    """
    if centering not in ("probability", "logit"):
        raise ValueError(
            f"weights=center needs logit or probability centering; centering={centering!r} keeps no "
            "estimate of usage: use weights=model or weights=uniform"
        )
    logits = center.detach().double().reshape(-1)
    if centering == "logit" and (normalization != "vmf" or raw_scores):
        logits = logits / temperature
    return logits.log_softmax(0)


def prototype_mixture(
    prototypes: Prototypes, temperature: float, log_weights: Tensor | None = None
) -> VMFMixture:
    """The mixture that a prototype layer stands for.

    Args:
        prototypes: teacher's or student's layer.
        temperature: its ``tau``; concentrations are ``||w_k|| / tau``.
        log_weights: ``(K,)`` up to a constant; default ``model_log_weights``.

    Returns:
        The mixture. With default weights its hard assignments are the layer's arg-max.

    Raises:
        ValueError: for a non-positive temperature or prototypes that are not finite.

    Example:
        >>> layer = Prototypes(8, 5, "none")
        >>> y = F.normalize(torch.randn(4, 8), dim=-1)
        >>> ours = prototype_mixture(layer, 0.1).responsibilities(y)
        >>> bool(torch.allclose(ours, layer(y, 0.1).softmax(-1), atol=1e-5))
        True
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be greater than 0 (teacher: 0.04 to 0.07)"
        )
    if log_weights is None:
        log_weights = model_log_weights(prototypes, temperature)
    return VMFMixture(
        prototypes.directions().detach(), prototypes.concentration(temperature), log_weights
    )


def typicality(log_likelihood: Tensor, reference: Tensor) -> Tensor:
    """Share of reference images that are at most as likely, in [0, 1]: 0 is an outlier.

    Args:
        log_likelihood: ``(N,)``.
        reference: log-likelihoods ``(M,)`` of the images that define what is typical, such as the
            training set.

    Returns:
        float64 ``(N,)``.

    Raises:
        ValueError: if the reference is empty.

    Example:
        >>> typicality(torch.tensor([0.0, 2.5, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    if not len(reference):
        raise ValueError("reference is empty: typicality needs images to compare with")
    ordered = np.sort(reference.detach().double().cpu().numpy())
    rank = np.searchsorted(ordered, log_likelihood.detach().double().cpu().numpy(), side="right")
    return torch.from_numpy(rank / len(ordered))
