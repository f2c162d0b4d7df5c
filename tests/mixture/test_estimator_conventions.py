"""scikit-learn's own checks, and what else its users expect."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from dinovmf_plugin.mixture import VonMisesFisherMixture


@parametrize_with_checks(
    [VonMisesFisherMixture(), VonMisesFisherMixture(n_components=2, random_state=0, n_init=2)]
)
def test_check_estimator(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    rng = np.random.default_rng(0)
    means = np.eye(5)[:3]
    draws = [stats.vonmises_fisher(m, 30.0).rvs(200, random_state=rng) for m in means]
    return np.concatenate(draws)


@pytest.fixture(scope="module")
def fitted(data) -> VonMisesFisherMixture:
    return VonMisesFisherMixture(3, random_state=0).fit(data)


def log_density(x: np.ndarray, model: VonMisesFisherMixture) -> np.ndarray:
    """The definition, by scipy's own distribution."""
    parts = [
        np.log(w) + stats.vonmises_fisher(m / np.linalg.norm(m), k).logpdf(x)
        for w, m, k in zip(model.weights_, model.directions_, model.concentrations_, strict=True)
    ]
    return np.logaddexp.reduce(np.stack(parts), axis=0)


def test_score_samples__is_scipys_density(data, fitted):
    np.testing.assert_allclose(fitted.score_samples(data), log_density(data, fitted), atol=1e-10)
    assert fitted.score(data) == pytest.approx(log_density(data, fitted).mean(), abs=1e-12)
    assert fitted.lower_bound_ == pytest.approx(fitted.score(data), abs=1e-10)


def test_criteria__count_what_is_free(data, fitted):
    # three directions on the sphere in 5 dimensions, three concentrations, two proportions
    free, total = 3 * 4 + 3 + 2, log_density(data, fitted).sum()
    assert fitted.aic(data) == pytest.approx(2 * free - 2 * total)
    assert fitted.bic(data) == pytest.approx(free * np.log(600) - 2 * total)


def test_bic__finds_the_number_of_components(data):
    bic = [VonMisesFisherMixture(k, random_state=0).fit(data).bic(data) for k in (1, 2, 3, 4)]
    assert np.argmin(bic) == 2


def test_predict__agrees_with_probabilities(data, fitted):
    probabilities = fitted.predict_proba(data)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(fitted.predict(data), probabilities.argmax(axis=1))
    np.testing.assert_array_equal(
        VonMisesFisherMixture(3, random_state=0).fit_predict(data), fitted.predict(data)
    )


def test_rows__are_directions(data, fitted):
    lengths = np.random.default_rng(1).uniform(1e-3, 1e3, (len(data), 1))
    again = VonMisesFisherMixture(3, random_state=0).fit(data * lengths)
    np.testing.assert_allclose(again.directions_, fitted.directions_, atol=1e-10)
    np.testing.assert_allclose(fitted.score_samples(data * 1e200), fitted.score_samples(data))


def test_zero_rows__left_out_of_the_fit_and_predicted_by_proportion(data, fitted):
    holes = np.insert(data, [0, 100], 0.0, axis=0)
    with pytest.warns(UserWarning, match="2 rows of X are zero"):
        again = VonMisesFisherMixture(3, random_state=0).fit(holes)
    np.testing.assert_array_equal(again.directions_, fitted.directions_)
    np.testing.assert_allclose(fitted.predict_proba(np.zeros((1, 5)))[0], fitted.weights_)


@pytest.mark.parametrize("chunk", [1, 7, 600, 10_000])
def test_chunks__change_nothing(data, fitted, chunk):
    again = VonMisesFisherMixture(3, random_state=0, chunk_size=chunk).fit(data)
    np.testing.assert_allclose(again.directions_, fitted.directions_, atol=1e-12)
    np.testing.assert_allclose(again.concentrations_, fitted.concentrations_, rtol=1e-10)
    np.testing.assert_allclose(again.predict_proba(data), fitted.predict_proba(data), atol=1e-10)


def test_dtype__of_the_data_is_that_of_the_results(data, fitted):
    single = VonMisesFisherMixture(3, random_state=0).fit(data.astype(np.float32))
    for name in ("directions_", "concentrations_", "weights_"):
        assert getattr(single, name).dtype == np.float32
        assert getattr(fitted, name).dtype == np.float64
    assert single.predict_proba(data.astype(np.float32)).dtype == np.float32
    assert single.sample(3)[0].dtype == np.float32
    np.testing.assert_allclose(single.concentrations_, fitted.concentrations_, rtol=1e-4)


def test_random_state__decides_everything(data):
    one, two = (
        VonMisesFisherMixture(3, random_state=5, init="random", n_init=2).fit(data)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.directions_, two.directions_)
    np.testing.assert_array_equal(one.sample(20)[0], two.sample(20)[0])


@pytest.mark.filterwarnings("ignore:EM gained more")
def test_n_init__keeps_the_best(data):
    settings = {"n_components": 6, "init": "random", "max_iter": 5}
    # the first of several starts is the only one of one: the same seed draws it
    gains = [
        VonMisesFisherMixture(**settings, random_state=seed, n_init=4).fit(data).lower_bound_
        - VonMisesFisherMixture(**settings, random_state=seed).fit(data).lower_bound_
        for seed in range(8)
    ]
    assert min(gains) >= 0
    assert max(gains) > 1e-4


def test_warm_start__goes_on(data):
    with pytest.warns(ConvergenceWarning, match="max_iter=2"):
        model = VonMisesFisherMixture(6, random_state=0, max_iter=2, warm_start=True).fit(data)
    first = model.lower_bound_
    model.set_params(max_iter=200).fit(data)
    assert model.lower_bounds_[0] >= first - 1e-12  # did not start anew
    assert model.lower_bound_ > first
    assert model.converged_
    with pytest.raises(ValueError, match="warm_start=True needs"):
        model.set_params(n_components=4).fit(data)


def test_init__directions_are_where_it_starts(data):
    means = np.eye(5)[[2, 0, 1]]
    model = VonMisesFisherMixture(3, init=means).fit(data)
    np.testing.assert_array_equal((model.directions_ @ means.T).argmax(axis=1), [0, 1, 2])
    with pytest.raises(ValueError, match=r"init has shape \(2, 5\): \(3, 5\)"):
        VonMisesFisherMixture(3, init=means[:2]).fit(data)


def test_sample__has_the_mixtures_moments(fitted):
    drawn, component = fitted.sample(30_000)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-12)
    share = np.bincount(component) / len(component)
    np.testing.assert_allclose(share, fitted.weights_, atol=0.02)
    for k in range(3):
        mean = drawn[component == k].mean(axis=0)
        # E[x] = A_p(kappa) mu; A_5 = I_{5/2} / I_{3/2}
        kappa = fitted.concentrations_[k]
        expected = special.ive(2.5, kappa) / special.ive(1.5, kappa) * fitted.directions_[k]
        np.testing.assert_allclose(mean, expected, atol=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_components": 0}, "n_components=0 must be a whole number of at least 1"),
        ({"n_components": 2.5}, "n_components=2.5 must be a whole number"),
        ({"tol": -1.0}, r"tol=-1.0 must lie in \[0, inf\]"),
        (
            {"max_concentration": 1e9},
            r"max_concentration=1000000000.0 must lie in \[0.001, 100000\]",
        ),
        ({"memory": 0.5}, r"memory=0.5 must lie in \[1, inf\]"),
        ({"init": "kmeans"}, "init='kmeans' is unknown: choose k-means"),
        ({"chunk_size": 0}, "chunk_size=0 must be"),
    ],
)
def test_parameters__named_when_wrong(data, wrong, message):
    with pytest.raises(ValueError, match=message):
        VonMisesFisherMixture(**wrong).fit(data)


def test_data__named_when_wrong(data):
    with pytest.raises(ValueError, match="n_samples=2, fewer than n_components=3"):
        VonMisesFisherMixture(3).fit(data[:2])
    with pytest.raises(ValueError, match="5000 columns"):
        VonMisesFisherMixture().fit(np.ones((2, 5000)))


def test_verbose__shows_a_bar(data, capsys):
    VonMisesFisherMixture(3, random_state=0, verbose=True).fit(data)
    shown = capsys.readouterr().err
    assert "iteration=2" in shown
    assert "gain=" in shown
    assert "100%" in shown
    VonMisesFisherMixture(3, random_state=0).fit(data)
    assert capsys.readouterr().err == ""
