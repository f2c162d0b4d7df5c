"""Data sampled from known mixtures: EM finds directions, concentrations and proportions again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from dinovmf_plugin.mixture import VonMisesFisherMixture


def spread_directions(num: int, dim: int, rng: np.random.Generator) -> NDArray:
    """Directions that are not close to each other."""
    if dim == 3:  # Fibonacci's lattice
        height = 1 - (2 * np.arange(num) + 1) / num
        turn = np.pi * (1 + 5**0.5) * np.arange(num)
        flat = np.sqrt(1 - height**2)
        return np.stack([flat * np.cos(turn), flat * np.sin(turn), height], axis=1)
    found = rng.standard_normal((num, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def draw(dim: int, num: int, low: float, high: float, rows: int):
    """Rows, and what they were drawn from: directions, concentrations ``low .. high``, proportions."""
    rng = np.random.default_rng(dim * num)
    means = spread_directions(num, dim, rng)
    kappa = rng.permutation(np.geomspace(low, high, num))
    weights = rng.uniform(1, 4, num)
    counts = np.round(rows * weights / weights.sum()).astype(int)
    drawn = [
        stats.vonmises_fisher(m, k).rvs(int(n), random_state=rng)
        for m, k, n in zip(means, kappa, counts, strict=True)
    ]
    return np.concatenate(drawn), means, kappa, counts / counts.sum()


def matched(model: VonMisesFisherMixture, means: NDArray) -> NDArray:
    """Component of the model for each true one, one to one."""
    return linear_sum_assignment(-(means @ model.directions_.T))[1]


CASES = [  # dim, components, concentrations, rows
    (3, 3, 5, 500, 30_000),
    (3, 16, 100, 500, 40_000),
    (3, 64, 400, 500, 100_000),
    (16, 3, 5, 500, 30_000),
    (16, 16, 20, 500, 40_000),
    (16, 64, 50, 500, 60_000),
    (256, 3, 60, 500, 20_000),
    (256, 16, 150, 500, 20_000),
    pytest.param(256, 64, 200, 500, 60_000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("dim", "num", "low", "high", "rows"), CASES)
def test_fit__known_mixture__found_again(dim, num, low, high, rows, dtype):
    x, means, kappa, weights = draw(dim, num, low, high, rows)
    model = VonMisesFisherMixture(num, random_state=0, tol=1e-5).fit(x.astype(dtype))
    match = matched(model, means)
    cosine = (means * model.directions_[match]).sum(axis=1)
    assert np.rad2deg(np.arccos(np.minimum(cosine, 1))).max() < 5
    # the estimate of kappa has a standard deviation of kappa sqrt(2 / (n (p - 1))) at the least
    noise = np.sqrt(2 / (rows * weights * (dim - 1)))
    assert (np.abs(model.concentrations_[match] / kappa - 1) < np.maximum(0.05, 4 * noise)).all()
    assert np.abs(model.weights_[match] - weights).max() < 0.02
    # float32 knows kappa <mu, x> of up to 500 to 3e-5, and the mean over rows better
    rounding = 1e-5 if dtype == np.float32 else 1e-9
    assert np.diff(model.lower_bounds_).min(initial=0) > -rounding


@pytest.mark.parametrize(("dim", "num", "low", "high", "rows"), [CASES[0], CASES[4]])
def test_fit__as_likely_as_from_the_truth(dim, num, low, high, rows):
    x, means, *_ = draw(dim, num, low, high, rows)
    ours = VonMisesFisherMixture(num, random_state=0, tol=1e-7).fit(x)
    ideal = VonMisesFisherMixture(num, init=means, tol=1e-7).fit(x)
    assert ours.lower_bound_ == pytest.approx(ideal.lower_bound_, abs=1e-4)


def test_fit__one_component__is_the_closed_form():
    x, *_ = draw(3, 1, 20, 20, 5_000)
    model = VonMisesFisherMixture().fit(x)
    mean = x.mean(axis=0)
    np.testing.assert_allclose(model.directions_[0], mean / np.linalg.norm(mean), atol=1e-12)
    kappa = model.concentrations_[0]
    assert 1 / np.tanh(kappa) - 1 / kappa == pytest.approx(np.linalg.norm(mean), rel=1e-9)


def test_fit__from_a_bad_start__never_falls():
    x, *_ = draw(16, 16, 20, 500, 4_000)
    model = VonMisesFisherMixture(40, init="random", random_state=0).fit(x)
    assert len(model.lower_bounds_) > 5
    assert np.diff(model.lower_bounds_).min() > -1e-10


def test_fit__equal_rows__concentration_is_bounded():
    x = np.repeat(np.eye(4)[:2], 10, axis=0)
    model = VonMisesFisherMixture(2, random_state=0, max_concentration=300.0).fit(x)
    np.testing.assert_allclose(model.concentrations_, 300)
    np.testing.assert_allclose(np.sort(model.predict_proba(x)[[0, 10]], axis=1)[:, 1], 1)


def test_fit__more_components_than_different_rows__finite():
    x = np.repeat(np.eye(3), 5, axis=0)
    model = VonMisesFisherMixture(6, random_state=0).fit(x)
    assert np.isfinite(model.lower_bound_)
    assert np.isfinite(model.predict_proba(x)).all()


def test_empty_component__starts_again():
    # two components start where there is nothing: one narrow blob far from them, two blobs to share
    x, means, *_ = draw(16, 3, 100, 100, 3_000)
    away = -means.sum(axis=0, keepdims=True)
    start = np.concatenate([means[:1], away, away])
    model = VonMisesFisherMixture(3, init=start, random_state=0).fit(x)
    cosine = (means @ model.directions_.T).max(axis=1)
    assert cosine.min() > 0.99
    assert np.diff(model.lower_bounds_).min() >= -1e-10


def test_partial_fit__stream__reaches_the_batch_fit():
    x, means, kappa, weights = draw(16, 16, 20, 500, 40_000)
    x = np.random.default_rng(0).permutation(x)
    stream = VonMisesFisherMixture(16, random_state=0)
    for batch in np.array_split(x, 80):
        stream.partial_fit(batch)
    match = matched(stream, means)
    cosine = (means * stream.directions_[match]).sum(axis=1)
    assert np.rad2deg(np.arccos(cosine)).max() < 5
    assert np.abs(stream.concentrations_[match] / kappa - 1).max() < 0.1
    assert np.abs(stream.weights_[match] - weights).max() < 0.02
    assert stream.score(x) > VonMisesFisherMixture(16, random_state=0).fit(x).score(x) - 0.05


def test_partial_fit__after_fit__goes_on_from_there():
    x, *_ = draw(16, 3, 50, 50, 2_000)
    model = VonMisesFisherMixture(3, random_state=0).fit(x)
    before = model.directions_.copy()
    model.partial_fit(x[:100])
    assert 0 < np.abs(model.directions_ - before).max() < 0.05
