import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from dinovmf_plugin.evaluation.logistic.transfer import WEIGHT_DECAYS, cross_validated_accuracy


def _data(rows, classes, seed, dim=12, noise=2.0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(classes, dim))
    labels = np.sort(np.arange(rows) % classes)
    return centers[labels] + noise * rng.normal(size=(rows, dim)) + 1, labels


def test_the_grid_is_the_protocols():
    assert len(WEIGHT_DECAYS) == 45
    assert WEIGHT_DECAYS[0] == pytest.approx(1e-6)
    assert WEIGHT_DECAYS[-1] == pytest.approx(1e5)
    assert np.allclose(np.diff(np.log10(WEIGHT_DECAYS)), 0.25)


@pytest.mark.parametrize("select", ["top1", "mean_per_class"])
@pytest.mark.parametrize("classes", [2, 4])
def test_equals_cold_started_fits_of_sklearn(select, classes):
    x, y = _data(80, classes, 1)
    x, y = x[:70], y[:70]  # unequal classes, so that the two metrics differ
    x_test, y_test = _data(100, classes, 2)
    grid = np.logspace(0, 3, 4).tolist()
    found = cross_validated_accuracy(
        x, y, x_test, y_test, weight_decays=grid, select=select, tol=1e-6, max_iter=5000, seed=3
    )
    curve = {"top1": [], "mean_per_class": []}

    def softmax_regression(strength):
        # explicit two-class softmax: strength / 2 on the difference of the two vectors
        c = 1 / strength if classes > 2 else 2 / strength
        return LogisticRegression(C=c, tol=1e-6, max_iter=5000)

    for strength in grid:
        top1, balanced = [], []
        for fit, held in StratifiedKFold(5, shuffle=True, random_state=3).split(x, y):
            predicted = softmax_regression(strength).fit(x[fit], y[fit]).predict(x[held])
            right = predicted == y[held]
            top1.append(100 * right.mean())
            balanced.append(100 * np.mean([right[y[held] == c].mean() for c in range(classes)]))
        curve["top1"].append(np.mean(top1))
        curve["mean_per_class"].append(np.mean(balanced))
    assert found["cv"]["top1"] == pytest.approx(curve["top1"])
    assert found["cv"]["mean_per_class"] == pytest.approx(curve["mean_per_class"])
    assert found["unfinished_fits"] == 0
    best = max(curve[select])
    chosen = max(s for s, value in zip(grid, curve[select], strict=True) if np.isclose(value, best))
    assert found["weight_decay"] == chosen
    right = softmax_regression(chosen).fit(x, y).predict(x_test) == y_test
    assert found["top1"] == pytest.approx(100 * right.mean())
    per_class = [right[y_test == c].mean() for c in range(classes)]
    assert found["mean_per_class"] == pytest.approx(100 * np.mean(per_class))


def test_folds_in_parallel_give_the_same():
    x, y = _data(60, 3, 1)
    inputs = (x, y, *_data(30, 3, 2))
    one = cross_validated_accuracy(*inputs, weight_decays=[1.0, 100.0])
    assert cross_validated_accuracy(*inputs, weight_decays=[1.0, 100.0], n_jobs=2) == one


def test_folds_share_the_threads_that_blas_may_use(monkeypatch):
    from dinovmf_plugin.evaluation.logistic import transfer

    seen = []

    def spy(*args, fit=transfer._scores_along_path):
        seen.append(transfer._blas_threads())
        return fit(*args)

    monkeypatch.setattr(transfer, "_scores_along_path", spy)
    x, y = _data(60, 3, 1)
    with threadpool_limits(1):  # as OMP_NUM_THREADS=1
        cross_validated_accuracy(x, y, x, y, weight_decays=[1.0])
        assert seen == [1] * 6
    with threadpool_limits(2):
        seen.clear()
        cross_validated_accuracy(x, y, x, y, weight_decays=[1.0], n_jobs=1)
        assert seen == [2] * 6
        seen.clear()
        cross_validated_accuracy(x, y, x, y, weight_decays=[1.0])
        assert seen == [1] * 5 + [2]  # two folds at once, then the fit on everything
        assert transfer._blas_threads() == 2


def test_warm_starts_save_iterations_and_change_nothing(monkeypatch):
    iterations = []

    class Counted(LogisticRegression):
        cold = False

        def fit(self, x, y):
            if self.cold and hasattr(self, "coef_"):
                del self.coef_
            super().fit(x, y)
            iterations.append(int(self.n_iter_[0]))
            return self

    monkeypatch.setattr("dinovmf_plugin.evaluation.logistic.regression.LogisticRegression", Counted)
    inputs = (*_data(120, 4, 1), *_data(80, 4, 2))
    settings = {"weight_decays": np.logspace(-1, 3, 17).tolist(), "tol": 1e-6, "max_iter": 5000}
    warm = cross_validated_accuracy(*inputs, **settings)
    assert len(iterations) >= 17 * 5 + 1
    in_folds = sum(iterations[: 17 * 5])
    iterations.clear()
    Counted.cold = True
    assert cross_validated_accuracy(*inputs, **settings) == warm
    assert in_folds < 0.9 * sum(iterations[: 17 * 5])


def test_a_common_offset_changes_neither_the_optimum_nor_the_effort():
    """Raw CLS tokens have one; uncentered, it keeps lbfgs from converging."""
    x, y = _data(150, 3, 1)
    x_test, y_test = _data(90, 3, 2)
    grid = np.logspace(-1, 3, 5).tolist()
    plain = cross_validated_accuracy(x, y, x_test, y_test, weight_decays=grid, tol=1e-6)
    far, far_test = x + 300, x_test + 300
    kept = far.copy(), far_test.copy()
    found = cross_validated_accuracy(far, y, far_test, y_test, weight_decays=grid, tol=1e-6)
    assert found == plain
    assert found["unfinished_fits"] == 0
    # the same as scikit-learn's own optimum of the offset features, given all the time it wants
    reference = LogisticRegression(C=1 / found["weight_decay"], tol=1e-7, max_iter=100_000)
    right = reference.fit(far, y).predict(far_test) == y_test
    assert found["top1"] == pytest.approx(100 * right.mean())
    assert int(reference.n_iter_[0]) > 100
    np.testing.assert_array_equal(far, kept[0])  # the caller's arrays are not touched
    np.testing.assert_array_equal(far_test, kept[1])


def test_unfinished_fits_are_counted():
    x, y = _data(60, 3, 1)
    found = cross_validated_accuracy(x, y, x, y, weight_decays=[1e-6, 1.0], max_iter=1)
    # two strengths in each of five folds, and at most two in the final fit
    assert 11 <= found["unfinished_fits"] <= 12


def test_labels_of_any_value_and_metrics_that_differ():
    x, y = _data(100, 2, 1, noise=0.01)
    names = np.array([70, -3])
    x_test, y_test = _data(100, 2, 2, noise=0.01)
    wrong = np.flatnonzero(y_test == 1)[:25]
    x_test[wrong] = x_test[y_test == 0][:25]  # half of one class looks like the other
    drop = np.flatnonzero(y_test == 0)[10:]
    keep = np.setdiff1d(np.arange(100), drop)
    found = cross_validated_accuracy(
        x, names[y], x_test[keep], names[y_test[keep]], weight_decays=[1.0]
    )
    assert found["top1"] == pytest.approx(100 * 35 / 60)
    assert found["mean_per_class"] == pytest.approx(75.0)
    assert (found["classes"], found["train_images"], found["test_images"]) == (2, 100, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_labels": [0, 0, 0, 0, 0, 1, 1, 1, 1]},
            "class 1 has 4 images, so it would be missing .*: give it at least 5, or use folds=4",
        ),
        (
            {"train_labels": [0, 0, 0, 0, 0, 0, 0, 0, 1]},
            "class 1 has 1 images, so it would be missing .* or leave this class out",
        ),
        ({"train_labels": [5] * 9}, "at least two classes, got 1"),
        ({"test_labels": [0] * 8 + [7]}, "test class 7 has no training image"),
        ({"train_labels": [0, 1]}, "birds: 9 features need as many labels"),
        ({"train_features": np.full((9, 12), np.inf)}, "birds features hold a NaN or infinity"),
        ({"weight_decays": []}, "at least one strength"),
        ({"weight_decays": [0.0]}, "all positive"),
        ({"select": "top5"}, "select='top5' must be one of"),
        ({"folds": 1}, "folds=1 must be at least 2"),
        ({"n_jobs": 0}, "n_jobs=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, _ = _data(9, 2, 1)
    y = [0, 0, 0, 0, 1, 1, 1, 1, 1]
    inputs = {"train_features": x, "train_labels": y, "test_features": x, "test_labels": y}
    with pytest.raises(ValueError, match=message):
        cross_validated_accuracy(
            **({"folds": 4, "name": "birds"} | inputs | _folds(message) | change)
        )


def _folds(message):
    return {"folds": 5} if "missing" in message else {}
