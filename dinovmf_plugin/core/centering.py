"""From the teacher's scores to the student's targets: logit, probability and Sinkhorn centering.

Everything works on raw scores ``s = <w, y>`` ``(rows, K)``, a temperature ``tau`` and, for vMF
prototypes, the log-normalizer ``D(||w|| / tau)`` ``(K,)``. State is one float32 buffer ``center``
``(1, K)``, saved in checkpoints and equal on every rank: the means are exact over all ranks, even
when these hold different numbers of rows. Targets use the center *before* the step's update, as the
official code does; with gradient accumulation every micro-batch updates it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.assignments import log_mean_over_ranks, log_mean_probability, sinkhorn
from dinovmf_plugin.core.workspace import room

__all__ = [
    "CENTERINGS",
    "Centering",
    "CenteringName",
    "LogitCentering",
    "ProbabilityCentering",
    "SinkhornCentering",
    "Statistic",
    "make_centering",
]

Statistic = Literal["sum", "log_probability"]
CenteringName = Literal["logit", "probability", "sinkhorn"]
CENTERINGS: tuple[str, ...] = get_args(CenteringName)


class Centering(nn.Module):
    """Base of the three: a center, its EMA momentum, and the two steps every subclass defines.

    Args:
        num_prototypes: ``K``.
        momentum: EMA coefficient ``m`` of the center in [0, 1) (DINO: 0.9).

    Attributes:
        linear: whether a batch's center is a linear function of its mean scores, so that one row, the
            mean, may stand for all of them in ``update``.
        row_wise: whether a row's targets depend on no other row, so that they may be made in chunks.
        statistic: what ``update_from`` takes: ``sum`` of the scores over the rows, or ``log_probability``,
            ``log sum_b softmax(l_b)``.

    Raises:
        ValueError: if the momentum lies outside [0, 1).
    """

    center: Tensor
    linear: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    statistic: ClassVar[Statistic | None] = None

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"center_momentum={momentum} must lie in [0, 1); DINO uses 0.9")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # `module.bfloat16()` and Lightning's bf16-true would round an EMA of 8 significant bits to
        # a standstill: the center follows the device and stays float32.
        exact = self.center
        super()._apply(fn, recurse)
        if self.center.dtype != torch.float32:
            self.center = exact.to(device=self.center.device, dtype=torch.float32)
        return self

    @torch.no_grad()
    def forward(
        self, scores: Tensor, temperature: float, log_normalizer: Tensor | None = None
    ) -> Tensor:
        """Targets ``(rows, K)``: float32 probabilities without gradient."""
        with torch.autocast(scores.device.type, enabled=False):
            return self._targets(scores.float(), temperature, log_normalizer)

    @torch.no_grad()
    def update(
        self,
        scores: Tensor | Iterable[Tensor],
        temperature: float,
        log_normalizer: Tensor | None = None,
    ) -> None:
        """Move the center towards this batch: ``c <- m c + (1 - m) batch_center``.

        Args:
            scores: ``(rows, K)``; or chunks of rows, made one after the other, where all of them
                together would not fit (iBOT's patches).
            temperature: the teacher's.
            log_normalizer: ``(K,)`` at this temperature, for vMF prototypes.
        """
        chunks = [scores] if isinstance(scores, Tensor) else scores
        self._move(self._batch_center(chunks, temperature, log_normalizer))

    @torch.no_grad()
    def update_from(
        self, statistic: Tensor, rows: int, temperature: float, log_normalizer: Tensor | None = None
    ) -> None:
        """``update`` by this rank's ``statistic`` ``(1, K)`` of ``rows`` rows, made elsewhere."""
        self._move(self._center_of(statistic, rows, temperature, log_normalizer))

    def affine_logits(
        self, temperature: float, log_normalizer: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """``(bias, shift)``, ``(K,)`` each, of targets ``softmax(s / tau + bias - shift)``.

        The softmax in ``statistic`` is that of ``s / tau + bias``. None for targets of another form.
        """
        return None

    def _move(self, batch: Tensor) -> None:
        self.center.lerp_(batch, 1 - self.momentum)

    def _center_of(
        self, statistic: Tensor, rows: int, temperature: float, bias: Tensor | None
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no center")

    def _targets(self, scores: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no targets")

    def _batch_center(
        self, chunks: Iterable[Tensor], temperature: float, bias: Tensor | None
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no center")

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"num_prototypes={self.center.shape[-1]}, momentum={self.momentum}"


def _logits(scores: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    logits = torch.div(scores.float(), temperature, out=_like(scores))
    return logits if bias is None else logits.add_(bias)


def _like(scores: Tensor) -> Tensor:
    """Kept memory for float32 scores: fresh memory costs a CPU more than the arithmetic."""
    return room(scores.shape, torch.float32, scores.device)


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias.float()


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, out=_like(logits))


class LogitCentering(Centering):
    """Center in logit space (paper Eq. 8): ``c`` is an EMA of the batch mean of the scores.

    Without a log-normalizer this is DINO: ``softmax((s - c) / tau)``, ``c`` in units of raw scores,
    so that it keeps its meaning while the temperature warms up. With one, the scores of Eq. 8 are the
    modified logits ``l = s / tau + D`` of section 3.4 and ``c`` is subtracted after the temperature.

    Args:
        num_prototypes: ``K``.
        momentum: EMA coefficient.
        raw_scores: center the raw scores even when there is a log-normalizer, leaving ``D`` out of the
            center (the other reading of the paper's vMF + logit cell).

    Example:
        >>> centering = LogitCentering(4)
        >>> scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> targets = centering(scores, temperature=0.5)
        >>> centering.update(scores, temperature=0.5)
        >>> centering.center
        tensor([[0.1000, 0.0000, 0.0000, 0.0000]])
    """

    linear = True
    statistic = "sum"

    def __init__(
        self, num_prototypes: int, momentum: float = 0.9, raw_scores: bool = False
    ) -> None:
        super().__init__(num_prototypes, momentum)
        self.raw_scores = raw_scores

    def _targets(self, scores: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
        if bias is None or self.raw_scores:
            logits = torch.sub(scores, self.center, out=_like(scores)).div_(temperature)
            return _softmax(logits if bias is None else logits.add_(bias))
        return _softmax(_logits(scores, temperature, bias).sub_(self.center))

    def _batch_center(
        self, chunks: Iterable[Tensor], temperature: float, bias: Tensor | None
    ) -> Tensor:
        summed, rows = torch.zeros_like(self.center), 0
        for scores in chunks:
            summed += scores.sum(dim=0, dtype=torch.float32)
            rows += len(scores)
        return self._center_of(summed, rows, temperature, bias)

    def _center_of(
        self, statistic: Tensor, rows: int, temperature: float, bias: Tensor | None
    ) -> Tensor:
        mean = distributed.mean_over_rows(statistic, rows)
        if bias is None or self.raw_scores:
            return mean
        return _logits(mean, temperature, bias)

    def affine_logits(
        self, temperature: float, log_normalizer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The center is divided by the temperature where it is one of raw scores."""
        center = self.center.squeeze(0)
        if log_normalizer is None or self.raw_scores:
            center = center / temperature
        return _or_zeros(log_normalizer, center), center


class ProbabilityCentering(Centering):
    """Center in probability space (paper Eq. 9): an EMA of ``log mean_b softmax(l_b)``.

    The softmax inside is *not* centered; the target is ``softmax(l - c)`` with ``c`` not divided by the
    temperature (Eq. 7). ``-c`` estimates minus the log of each component's usage: "rich gets poorer".

    Example:
        >>> centering = ProbabilityCentering(2, momentum=0.0)
        >>> scores = torch.zeros(3, 2)
        >>> centering.update(scores, temperature=0.1)
        >>> centering.center.exp()
        tensor([[0.5000, 0.5000]])
    """

    statistic = "log_probability"

    def _targets(self, scores: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
        return _softmax(_logits(scores, temperature, bias).sub_(self.center))

    def affine_logits(
        self, temperature: float, log_normalizer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The center is one of logits."""
        center = self.center.squeeze(0)
        return _or_zeros(log_normalizer, center), center

    def _center_of(
        self, statistic: Tensor, rows: int, temperature: float, bias: Tensor | None
    ) -> Tensor:
        return log_mean_over_ranks(statistic, rows)

    def _batch_center(
        self, chunks: Iterable[Tensor], temperature: float, bias: Tensor | None
    ) -> Tensor:
        # map, as a generator expression would hold on to a chunk's scores while its logits are used
        make = functools.partial(_logits, temperature=temperature, bias=bias)
        return log_mean_probability(map(make, chunks))


class SinkhornCentering(Centering):
    """Targets by Sinkhorn-Knopp over the global batch: nothing to remember, so the center stays 0.

    Example:
        >>> centering = SinkhornCentering(8)
        >>> centering(torch.randn(4, 8), temperature=0.1).sum(dim=-1).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """

    row_wise = False

    def __init__(self, num_prototypes: int, iterations: int = 3) -> None:
        super().__init__(num_prototypes, momentum=0.0)
        if iterations < 1:
            raise ValueError(f"sinkhorn_iterations={iterations} must be at least 1; MSN uses 3")
        self.iterations = iterations

    def _targets(self, scores: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
        return sinkhorn(_logits(scores, temperature, bias), self.iterations)

    def update(
        self,
        scores: Tensor | Iterable[Tensor],
        temperature: float,
        log_normalizer: Tensor | None = None,
    ) -> None:
        """Sinkhorn has no state between batches."""


def make_centering(
    name: CenteringName,
    num_prototypes: int,
    *,
    momentum: float = 0.9,
    raw_scores: bool = False,
    iterations: int = 3,
) -> Centering:
    """Build the centering that a config names.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> make_centering("probability", 8)
        ProbabilityCentering(num_prototypes=8, momentum=0.9)
    """
    if name == "logit":
        return LogitCentering(num_prototypes, momentum, raw_scores)
    if name == "probability":
        return ProbabilityCentering(num_prototypes, momentum)
    if name == "sinkhorn":
        return SinkhornCentering(num_prototypes, iterations)
    raise ValueError(f"centering={name!r} is unknown: choose one of {CENTERINGS}")
