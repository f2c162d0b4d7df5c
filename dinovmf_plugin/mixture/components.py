"""Prototypes as the components of a mixture that follows embeddings by online EM (docs/em.md)."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import log_normalizer
from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.concentration import MAX_CONCENTRATION, banerjee_concentration
from dinovmf_plugin.mixture.em import Parameters, Statistics
from dinovmf_plugin.mixture.online import Memory, remember

__all__ = [
    "OnlineComponents",
    "over_ranks",
    "pooled_concentrations",
    "relative_magnitudes",
    "smoothed_log_weights",
]

_PRIOR_ROWS = 4.0


def pooled_concentrations(counts: Tensor, sums: Tensor) -> Tensor:
    """Concentrations of components of few rows: ``A_p(kappa_k) = (||s_k|| + a R) / (n_k + a)``.

    ``R = sum_k ||s_k|| / sum_k n_k`` is the pooled length and ``a`` 4 rows: the mode under the conjugate
    prior. ``A_p`` is inverted by Banerjee's formula.

    Args:
        counts: rows of the components ``(K,)``, at least one positive.
        sums: their sums ``(K, p)``.

    Returns:
        ``(K,)`` in sums' dtype; a component without rows has the pooled concentration.

    Example:
        >>> counts, sums = torch.tensor([8.0, 0.0]), torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> pooled_concentrations(counts, sums)
        tensor([1.8333, 1.8333])
    """
    norms = sums.norm(dim=1, dtype=torch.float64)  # 1 - length^2 would lose float32's digits
    pooled = norms.sum() / counts.double().sum()
    length = (norms + _PRIOR_ROWS * pooled) / (counts.double() + _PRIOR_ROWS)
    kappa = banerjee_concentration(length.clamp(max=1 - 1e-6), sums.shape[1])
    return kappa.clamp(max=MAX_CONCENTRATION).to(sums.dtype)


def relative_magnitudes(concentrations: Tensor, counts: Tensor) -> Tensor:
    """``g_k = kappa_k / mean kappa``, 1 on average over rows: temperatures keep their scale.

    Args:
        concentrations: ``(K,)``.
        counts: rows of the components ``(K,)``.

    Example:
        >>> relative_magnitudes(torch.tensor([100.0, 300.0]), torch.tensor([1.0, 1.0]))
        tensor([0.5000, 1.5000])
    """
    return concentrations * (counts.sum() / (counts * concentrations).sum())


def smoothed_log_weights(usage: Tensor, rows: float | Tensor) -> Tensor:
    """``log pi_k`` with ``pi_k = (N usage_k + 1) / (N + K)``: nobody's proportion fades to nothing.

    Example:
        >>> smoothed_log_weights(torch.tensor([1.0, 0.0]), 8).exp().round(decimals=4)
        tensor([0.9000, 0.1000])
    """
    return ((rows * usage + 1) / (rows + len(usage))).log()


def over_ranks(statistics: Statistics) -> Statistics:
    """Statistics of the rows of all ranks; the same on every rank, bit for bit."""
    if not distributed.is_distributed():
        return statistics
    scalars = torch.stack(
        [statistics.log_likelihood, statistics.log_likelihood.new_tensor(statistics.rows)]
    )
    for x in (statistics.counts, statistics.sums, scalars):
        dist.all_reduce(x)
    return Statistics(statistics.counts, statistics.sums, scalars[0], float(scalars[1]))


class OnlineComponents(nn.Module):
    """Sufficient statistics of K components, in float32 buffers, which are saved in checkpoints.

    ``observe`` is the E step on a batch, ``move`` forgets, takes the batch in and writes the M step's
    directions and magnitudes into prototype layers.

    Args:
        num_components: ``K``.
        dim: dimension ``p``.
        memory: rows of its own that a component remembers.

    Example:
        >>> layer = Prototypes(8, 4, "vmf").requires_grad_(False)
        >>> components = OnlineComponents(4, 8, memory=100.0)
        >>> y = torch.nn.functional.normalize(torch.randn(64, 8), dim=-1)
        >>> components.move(components.observe(y, layer), [layer])
        >>> round(float(components.usage.sum()), 4)
        1.0
    """

    counts: Tensor
    sums: Tensor
    usage: Tensor
    rows: Tensor

    def __init__(self, num_components: int, dim: int, memory: float) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("counts", torch.zeros(num_components))
        self.register_buffer("sums", torch.zeros(num_components, dim))
        self.register_buffer("usage", torch.zeros(num_components))
        self.register_buffer("rows", torch.zeros(()))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # as Centering: half precision would round the statistics to a standstill
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = value.to(device=moved.device, dtype=torch.float32)
        return self

    def parameters_of(self, prototypes: Prototypes) -> Parameters:
        """The data's mixture, Eq. 1 of docs/em.md, in float32; it needs a batch that was taken in."""
        return Parameters(
            prototypes.directions(),
            pooled_concentrations(self.counts, self.sums),
            smoothed_log_weights(self.usage, self.rows),
        )

    @torch.no_grad()
    def observe(self, embeddings: Tensor, prototypes: Prototypes) -> Statistics:
        """The E step on this rank's rows.

        Args:
            embeddings: unit vectors ``(rows, p)``; a few at a time are scored.
            prototypes: the layer whose directions the components have.

        Returns:
            Statistics in float32. Before anything was taken in, rows belong to the direction of largest
            cosine and the log-likelihood is 0.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            chunks = embeddings.float().split(em.chunk_rows(*self.sums.shape))
            if not bool(self.rows > 0):
                found = em.hard_statistics(chunks, prototypes.directions())
                return dataclasses.replace(
                    found,
                    counts=found.counts.float(),
                    sums=found.sums.float(),
                    log_likelihood=torch.zeros_like(found.log_likelihood),
                )
            parameters = self.parameters_of(prototypes)
            normalizer = log_normalizer(
                parameters.concentrations, self.sums.shape[1], order=prototypes.order
            )
            return em.sufficient_statistics(chunks, parameters, normalizer + parameters.log_weights)

    @torch.no_grad()
    def move(self, statistics: Statistics, layers: list[Prototypes]) -> None:
        """Take in a batch (of all ranks) and write directions and magnitudes into the layers."""
        old = None
        if bool(self.rows > 0):
            old = Memory(self.counts, self.sums, self.usage, float(self.rows))
        new = remember(old, statistics, self.memory)
        for name in ("counts", "sums", "usage"):
            getattr(self, name).copy_(getattr(new, name))
        self.rows.fill_(new.rows)
        magnitudes = relative_magnitudes(
            pooled_concentrations(self.counts, self.sums), self.counts
        ).unsqueeze(1)
        norms = self.sums.norm(dim=1, keepdim=True)
        for layer in layers:
            moved = self.sums / norms.clamp_min(torch.finfo(torch.float32).tiny)
            layer.weight_v.copy_(torch.where(norms > 0, moved, layer.directions()))
            layer.weight_g.copy_(magnitudes)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        num, dim = self.sums.shape
        memory = "inf" if math.isinf(self.memory) else f"{self.memory:g}"
        return f"num_components={num}, dim={dim}, memory={memory}"
