"""The loop of EM over rows that need not fit into memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.em import Parameters, Statistics
from dinovmf_plugin.mixture.initialization import initialization_rows, split_rows

__all__ = ["Fit", "UnitRows", "fit_em"]

_EMPTY = 1.0  # a component of less than one row's responsibility starts again
_TRIES = 10  # times that this is tried


class UnitRows:
    """Rows of an array as unit vectors, normalized chunk by chunk and never all at once; zeros stay zeros.

    Args:
        array: ``(N, p)``, float32 or float64, finite.
        chunk: rows at once; None: as ``em.chunk_rows`` says.
        progress: called with the number of rows that were handled.

    Example:
        >>> rows = UnitRows(np.array([[3.0, 4.0], [0.0, 2.0]]), chunk=1)
        >>> [chunk.tolist() for chunk in rows.chunks(1)]
        [[[0.6, 0.8]], [[0.0, 1.0]]]
    """

    def __init__(
        self,
        array: NDArray,
        chunk: int | None = None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self.array = array
        self.chunk = chunk
        self.progress = progress

    def __len__(self) -> int:
        return len(self.array)

    def chunks(self, num_components: int) -> Iterator[Tensor]:
        """All rows in order; chunks small enough for scores of so many components."""
        size = self.chunk or em.chunk_rows(num_components, self.array.shape[1])
        for start in range(0, len(self), size):
            yield _unit(self.array[start : start + size])
            self.progress(min(size, len(self) - start))

    def draw(self, rows: int, random: RandomState) -> Tensor:
        """So many different rows at random, or all of them in order if there are not more."""
        if rows >= len(self):
            return _unit(self.array)
        return _unit(self.array[np.sort(random.choice(len(self), rows, replace=False))])


def _unit(rows: NDArray) -> Tensor:
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / np.where(largest > 0, largest, 1)  # squares of 1e200 would overflow
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    scaled /= np.where(norms > 0, norms, 1)
    return torch.from_numpy(np.ascontiguousarray(scaled))


@dataclass(frozen=True)
class Fit:
    """What ``fit_em`` found.

    Attributes:
        parameters: the mixture of highest likelihood, which is the last one.
        statistics: of all rows under these parameters.
        log_likelihoods: mean log-likelihood relative to the uniform density under the parameters of
            every iteration; it never falls.
        converged: whether the last gain was below the tolerance.
        iterations: passes over the rows.
    """

    parameters: Parameters
    statistics: Statistics
    log_likelihoods: list[float] = field(default_factory=list)
    converged: bool = False
    iterations: int = 0


def fit_em(
    rows: UnitRows,
    start: Parameters,
    *,
    max_iter: int,
    tol: float,
    max_concentration: float,
    random: RandomState,
    report: Callable[[int, float], object] = lambda iteration, log_likelihood: None,
) -> Fit:
    """Run EM until the mean log-likelihood gains less than ``tol``.

    A component that lost its rows gets half of the widest one (the largest ``n_k - ||s_k||``). That is a
    try: if the likelihood falls, EM goes on from where it was without, and components stay empty.

    Args:
        rows: the data.
        start: parameters of the first E step.
        max_iter: passes over the data, at least 1.
        tol: least gain in nats per row.
        max_concentration: upper bound of the concentrations.
        random: what draws when components start again.
        report: called after every pass with its number and mean log-likelihood.

    Returns:
        The fit.
    """
    num = len(start.concentrations)
    parameters, without = start, None
    best: tuple[Parameters, Statistics] | None = None
    history: list[float] = []
    tries_left = _TRIES
    for iteration in range(1, max_iter + 1):
        statistics = em.sufficient_statistics(rows.chunks(num), parameters)
        value = float(statistics.log_likelihood) / statistics.rows
        report(iteration, value)
        if without is not None and value < history[-1]:
            parameters, without, tries_left = without, None, 0
            continue
        tried, without = without is not None, None
        best = parameters, statistics
        gain = value - history[-1] if history else np.inf
        history.append(value)
        empty = torch.nonzero(statistics.counts < _EMPTY).flatten()
        if gain < tol and not tried and not (tries_left and len(empty)):
            return Fit(*best, history, True, iteration)
        parameters = em.maximization(
            statistics, parameters.directions, max_concentration=max_concentration
        )
        if tries_left and len(empty):
            without, tries_left = parameters, tries_left - 1
            parameters = _refilled(rows, parameters, statistics, empty, random)
    assert best is not None
    return Fit(*best, history, False, max_iter)


def _refilled(
    rows: UnitRows,
    parameters: Parameters,
    statistics: Statistics,
    empty: Tensor,
    random: RandomState,
) -> Parameters:
    """Parameters in which the widest components have given one half each to the empty ones."""
    directions, log_weights = parameters.directions.clone(), parameters.log_weights.clone()
    concentrations = parameters.concentrations.clone()
    x = rows.draw(initialization_rows(len(concentrations)), random)
    offsets = em.component_offsets(parameters)
    wide = (statistics.counts - statistics.sums.norm(dim=1)).argsort(descending=True)
    for target, source in zip(empty.tolist(), wide.tolist(), strict=False):
        if target == source or statistics.counts[source] < 2 * _EMPTY:
            continue
        held = torch.cat(
            [
                em.log_joint(part, parameters, offsets).softmax(dim=1)[:, source]
                for part in x.split(em.chunk_rows(*directions.shape))
            ]
        )
        if not float(held.sum()) > 0:
            continue
        directions[source], directions[target] = split_rows(x, held, random)
        concentrations[target] = concentrations[source]
        log_weights[source] -= np.log(2.0)
        log_weights[target] = log_weights[source]
    return Parameters(directions, concentrations, log_weights.log_softmax(0))
