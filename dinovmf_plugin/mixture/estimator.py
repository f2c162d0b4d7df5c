"""A von Mises-Fisher mixture with scikit-learn's conventions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.concentration import MAX_CONCENTRATION
from dinovmf_plugin.mixture.em import Parameters
from dinovmf_plugin.mixture.fitting import Fit, UnitRows, fit_em
from dinovmf_plugin.mixture.initialization import initialization_rows, starting_parameters
from dinovmf_plugin.mixture.model import log_uniform_density
from dinovmf_plugin.mixture.online import remember
from dinovmf_plugin.mixture.sampling import sample_vmf

__all__ = ["VonMisesFisherMixture"]

_MAX_DIM = 4096  # of the exact normalizer


class VonMisesFisherMixture(DensityMixin, BaseEstimator):
    """Mixture of von Mises-Fisher distributions on the unit sphere, fitted by EM.

    Rows are directions: they are normalized here, so that features of any backbone can be given as they
    are. Log-densities are with respect to the sphere's surface measure, with the exact normalizer. A row
    of zeros is left out of the fit, with a warning; predictions know nothing of it but the proportions. The
    data are read in chunks: beside ``X`` a fit needs a few chunks (8 MB each in float32) and the
    parameters, whatever the number of rows and components.

    Source: Banerjee et al., JMLR 6 (2005); concentrations are maximum-likelihood by Newton's method, not
    their approximation.

    Args:
        n_components: number of components ``K``.
        tol: EM stops when the mean log-likelihood gains less, in nats per row.
        max_iter: passes over the data at most.
        n_init: starts; the fit of highest likelihood is kept.
        init: ``k-means++`` (see ``initialization.kmeans_plusplus_directions``), ``random`` (rows of the
            data) or directions ``(K, p)``.
        max_concentration: upper bound of the concentrations, in (0, 1e5]; a component of equal rows
            reaches it.
        memory: rows of its own that a component remembers in ``partial_fit``; ``inf`` forgets nothing.
        warm_start: whether ``fit`` starts from the last fit, once, instead of from ``init``.
        random_state: seed or generator of the starts and of ``sample``.
        chunk_size: rows at once; None: as many as make chunks of 2**21 numbers.
        verbose: whether to show a progress bar.

    Attributes:
        directions_: unit mean directions ``(K, p)``, in X's dtype, as all arrays here.
        concentrations_: concentrations ``(K,)``.
        weights_: proportions ``(K,)``.
        lower_bound_: mean log-likelihood of the training data.
        lower_bounds_: that of every iteration; it never falls.
        converged_: whether the last gain was below ``tol``.
        n_iter_: passes over the data of the best start.
        n_features_in_: dimension ``p``.

    Raises:
        ValueError: for parameters or data that cannot work: fewer rows than components, fewer than 2 or
            more than 4096 columns.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> model = VonMisesFisherMixture(n_components=3, random_state=0).fit(X)
        >>> model.directions_.shape, model.predict(X[:2] * 7).shape
        ((3, 4), (2,))
        >>> bool(model.score(X) > VonMisesFisherMixture().fit(X).score(X))
        True
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        tol: float = 1e-4,
        max_iter: int = 200,
        n_init: int = 1,
        init: Literal["k-means++", "random"] | ArrayLike = "k-means++",
        max_concentration: float = MAX_CONCENTRATION,
        memory: float = 10_000,
        warm_start: bool = False,
        random_state: int | RandomState | None = None,
        chunk_size: int | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init = init
        self.max_concentration = max_concentration
        self.memory = memory
        self.warm_start = warm_start
        self.random_state = random_state
        self.chunk_size = chunk_size
        self.verbose = verbose

    # ---- fitting --------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: None = None) -> VonMisesFisherMixture:
        """Fit the mixture to the rows of ``X`` ``(N, p)``; ``y`` is ignored.

        Warns:
            ConvergenceWarning: if ``max_iter`` passes were not enough.
        """
        self._check_parameters()
        array = self._training_rows(X, reset=True, rows=self.n_components)
        random = check_random_state(self.random_state)
        warm = self.warm_start and hasattr(self, "directions_")
        if warm and self.directions_.shape != (self.n_components, array.shape[1]):
            raise ValueError(
                f"warm_start=True needs X and n_components of the last fit, {self.directions_.shape}"
            )
        starts = 1 if warm else self.n_init
        best: Fit | None = None
        total = len(array) * self.max_iter * starts
        with tqdm(total=total, unit="row", unit_scale=True, disable=not self.verbose) as bar:
            rows = UnitRows(array, self.chunk_size, bar.update)
            for number in range(1, starts + 1):

                def report(iteration: int, value: float, number: int = number) -> None:
                    bar.set_postfix(start=number, iteration=iteration, gain=f"{value:.5g}")

                start = self._parameters() if warm else self._start(rows, random)
                found = fit_em(
                    rows,
                    start,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    max_concentration=self.max_concentration,
                    random=random,
                    report=report,
                )
                bar.update(len(array) * (self.max_iter - found.iterations))
                if best is None or found.log_likelihoods[-1] > best.log_likelihoods[-1]:
                    best = found
        assert best is not None
        if not best.converged:
            warnings.warn(
                f"EM gained more than tol={self.tol} in its last pass of max_iter={self.max_iter}: "
                "increase max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        uniform = log_uniform_density(array.shape[1])
        self._set_parameters(best.parameters, array.dtype)
        self._memory = remember(None, best.statistics, self.memory)
        self.lower_bounds_ = [value + uniform for value in best.log_likelihoods]
        self.lower_bound_ = self.lower_bounds_[-1]
        self.converged_ = best.converged
        self.n_iter_ = best.iterations
        return self

    def partial_fit(self, X: ArrayLike, y: None = None) -> VonMisesFisherMixture:
        """Take in a batch of rows ``(N, p)``: one step of online EM (see ``online.remember``).

        The first batch starts the mixture and needs at least ``n_components`` rows; after ``fit`` the
        stream goes on from there. ``y`` is ignored.
        """
        self._check_parameters()
        first = not hasattr(self, "directions_")
        array = self._training_rows(X, reset=first, rows=self.n_components if first else 1)
        rows = UnitRows(array, self.chunk_size)
        if first:
            start = self._start(rows, check_random_state(self.random_state))
        else:
            start = self._parameters()
        statistics = em.sufficient_statistics(rows.chunks(self.n_components), start)
        self._memory = remember(getattr(self, "_memory", None), statistics, self.memory)
        moved = em.maximization(
            em.Statistics(
                self._memory.counts, self._memory.sums, statistics.log_likelihood, statistics.rows
            ),
            start.directions,
            max_concentration=self.max_concentration,
        )
        log_weights = self._memory.usage.clamp_min(1e-300).log()
        self._set_parameters(
            Parameters(moved.directions, moved.concentrations, log_weights),
            array.dtype if first else self.directions_.dtype,
        )
        return self

    def fit_predict(self, X: ArrayLike, y: None = None) -> NDArray[np.int64]:
        """Fit, and return the most responsible component of each row, ``(N,)``."""
        return self.fit(X).predict(X)

    # ---- what the mixture says of rows ------------------------------------------------------------

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Most responsible component of each row, ``(N, p) -> (N,)``, int64."""
        return self._by_chunk(X, lambda joint: joint.argmax(dim=1))

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Responsibilities ``(N, p) -> (N, K)``, in X's dtype."""
        return self._by_chunk(X, lambda joint: joint.softmax(dim=1))

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """``log p(x)`` with respect to the sphere's surface measure, ``(N, p) -> (N,)``, float64."""
        relative = self._by_chunk(X, lambda joint: joint.logsumexp(dim=1).double())
        return relative + log_uniform_density(self.n_features_in_)

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean of ``score_samples``; ``y`` is ignored."""
        return float(self.score_samples(X).mean())

    def bic(self, X: ArrayLike) -> float:
        """Bayesian information criterion on ``X``: lower is better."""
        log_p = self.score_samples(X)
        return float(self._num_parameters() * np.log(len(log_p)) - 2 * log_p.sum())

    def aic(self, X: ArrayLike) -> float:
        """Akaike's information criterion on ``X``: lower is better."""
        return float(2 * self._num_parameters() - 2 * self.score_samples(X).sum())

    def sample(self, n_samples: int = 1) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Draw unit vectors ``(n_samples, p)`` and their components ``(n_samples,)``, sorted by these."""
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} must be at least 1")
        random = check_random_state(self.random_state)
        weights = self.weights_.astype(np.float64)
        counts = random.multinomial(n_samples, weights / weights.sum())
        generator = np.random.default_rng(random.randint(2**31 - 1))
        drawn = [
            sample_vmf(direction, float(kappa), int(count), seed=generator).numpy()
            for direction, kappa, count in zip(
                torch.from_numpy(self.directions_), self.concentrations_, counts, strict=True
            )
            if count
        ]
        components = np.repeat(np.arange(len(counts)), counts)
        return np.concatenate(drawn).astype(self.directions_.dtype), components

    # ---- helpers ----------------------------------------------------------------------------------

    def _num_parameters(self) -> int:
        """Free numbers: ``p - 1`` for a direction, one concentration, proportions that sum to 1."""
        return len(self.weights_) * (self.n_features_in_ + 1) - 1

    def _by_chunk(self, X: ArrayLike, function: Callable[[Tensor], Tensor]) -> NDArray[Any]:
        check_is_fitted(self)
        rows = UnitRows(self._validated(X, reset=False), self.chunk_size)
        parameters = self._parameters()
        offsets = em.component_offsets(parameters)
        parts = []
        for x in rows.chunks(len(offsets)):
            joint = em.log_joint(x, parameters, offsets)
            joint[~x.any(dim=1)] = parameters.log_weights.to(joint.dtype)
            parts.append(function(joint))
        return torch.cat(parts).numpy()

    def _validated(self, X: ArrayLike, *, reset: bool) -> NDArray[Any]:
        array: NDArray[Any] = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_min_features=2 if reset else 1,
        )
        if array.shape[1] > _MAX_DIM:
            raise ValueError(
                f"X has {array.shape[1]} columns: the exact normalizer is known up to {_MAX_DIM}"
            )
        return array

    def _training_rows(self, X: ArrayLike, *, reset: bool, rows: int) -> NDArray[Any]:
        """Validated rows without those of zeros."""
        array = self._validated(X, reset=reset)
        directed = np.concatenate(
            [part.any(axis=1) for part in np.array_split(array, len(array) // 65536 + 1)]
        )
        if not directed.all():
            warnings.warn(
                f"{np.count_nonzero(~directed)} rows of X are zero and have no direction: left out",
                UserWarning,
                stacklevel=3,
            )
            array = array[directed]
        if len(array) < rows:
            raise ValueError(
                f"X has n_samples={len(array)}, fewer than n_components={self.n_components}: a mixture "
                "starts with at least as many rows as components"
            )
        return array

    def _start(self, rows: UnitRows, random: RandomState) -> Parameters:
        x = rows.draw(initialization_rows(self.n_components), random)
        return starting_parameters(
            x, self.n_components, self.init, random, max_concentration=self.max_concentration
        )

    def _parameters(self) -> Parameters:
        weights = torch.from_numpy(self.weights_.astype(np.float64))
        return Parameters(
            F.normalize(torch.from_numpy(self.directions_.astype(np.float64)), dim=1),
            torch.from_numpy(self.concentrations_.astype(np.float64)),
            (weights / weights.sum()).clamp_min(1e-300).log(),
        )

    def _set_parameters(self, parameters: Parameters, dtype: Any) -> None:
        self.directions_ = parameters.directions.numpy().astype(dtype)
        self.concentrations_ = parameters.concentrations.numpy().astype(dtype)
        self.weights_ = parameters.log_weights.softmax(0).numpy().astype(dtype)

    def _check_parameters(self) -> None:
        for name, low in (("n_components", 1), ("max_iter", 1), ("n_init", 1), ("chunk_size", 1)):
            value = getattr(self, name)
            if name == "chunk_size" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {low}")
        bounds = (
            ("tol", 0, math.inf),
            ("max_concentration", 1e-3, MAX_CONCENTRATION),
            ("memory", 1, math.inf),
        )
        for name, least, most in bounds:
            value = getattr(self, name)
            if not isinstance(value, Real) or not least <= float(value) <= most:
                raise ValueError(f"{name}={value!r} must lie in [{least:g}, {most:g}]")
        if isinstance(self.init, str) and self.init not in ("k-means++", "random"):
            raise ValueError(
                f"init={self.init!r} is unknown: choose k-means++, random or an array of directions"
            )
