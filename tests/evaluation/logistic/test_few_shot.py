import numpy as np
import pytest
from scipy import optimize, special

from dinovmf_plugin.evaluation.logistic.few_shot import (
    center_and_normalize,
    few_shot_accuracy,
    few_shot_over_splits,
)
from dinovmf_plugin.evaluation.logistic.regression import multinomial_regression
from dinovmf_plugin.evaluation.logistic.splits import (
    draw_fraction,
    draw_per_class,
    draw_splits,
    match_listed,
    msn_split_files,
)


def _data(rows, classes, seed, dim=8):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(classes, dim))
    labels = np.arange(rows) % classes
    return centers[labels] + 1.5 * rng.normal(size=(rows, dim)) + 3, labels


def _softmax_optimum(x, y, lambd):
    """Minimizes mean log-loss + lambd / (2 N) ||W||^2 as the protocol writes it, without sklearn."""
    classes = len(np.unique(y))

    def objective(flat):
        weights = flat.reshape(classes, -1)
        log_p = special.log_softmax(x @ weights.T, axis=1)
        loss = -log_p[np.arange(len(y)), y].mean() + lambd / (2 * len(y)) * (weights**2).sum()
        residual = np.exp(log_p)
        residual[np.arange(len(y)), y] -= 1
        return loss, (residual.T @ x / len(y) + lambd / len(y) * weights).ravel()

    start = np.zeros(classes * x.shape[1])
    options = {"gtol": 1e-10, "ftol": 1e-15, "maxiter": 5000}
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(classes, -1)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("lambd", [0.075, 5.0])
def test_equals_the_protocols_objective(classes, lambd):
    x, y = _data(42, classes, 1)
    x_test, y_test = _data(210, classes, 2)
    z, z_test = (
        (rows - rows.mean(1, keepdims=True))
        / np.linalg.norm(rows - rows.mean(1, keepdims=True), axis=1, keepdims=True)
        for rows in (x, x_test)
    )
    weights = _softmax_optimum(z, y, lambd)
    expected = 100 * np.mean((z_test @ weights.T).argmax(1) == y_test)
    found = few_shot_accuracy(x, y, x_test, y_test, lambd=lambd, tol=1e-9, max_iter=5000)
    assert found == pytest.approx(expected)
    assert 100 / classes < found < 100
    # not only the accuracy: the probabilities of the fitted model are the optimum's
    model = multinomial_regression(lambd, classes, intercept=False, tol=1e-9, max_iter=5000)
    probabilities = model.fit(z, y).predict_proba(z_test)
    np.testing.assert_allclose(
        probabilities, special.softmax(z_test @ weights.T, axis=1), atol=1e-5
    )


def test_preprocessing_is_per_sample_and_can_be_left_out():
    x, y = _data(30, 3, 1)
    x_test, y_test = _data(90, 3, 2)
    offset = np.random.default_rng(3).normal(size=(90, 1)) * 50
    scale = np.random.default_rng(4).uniform(0.1, 9, size=(90, 1))
    plain = few_shot_accuracy(x, y, x_test, y_test)
    assert few_shot_accuracy(x, y, scale * x_test + offset, y_test) == plain
    raw = few_shot_accuracy(x, y, scale * x_test + offset, y_test, preprocess=False)
    assert raw < plain
    rows = center_and_normalize(x)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)


def test_mean_and_deviation_over_splits():
    x, y = _data(60, 3, 1)
    x_test, y_test = _data(60, 3, 2)
    splits = draw_splits(y, [1, 5], 0.2, num_splits=3, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "1 per class": 3,
        "5 per class": 3,
        "20 %": 1,
    }
    found = few_shot_over_splits(x, y, splits, x_test, y_test)
    alone = [few_shot_accuracy(x[r], y[r], x_test, y_test) for r in splits["5 per class"]]
    assert found["5 per class"]["accuracy"] == alone
    assert found["5 per class"]["mean"] == pytest.approx(sum(alone) / 3)
    spread = (sum((a - sum(alone) / 3) ** 2 for a in alone) / 2) ** 0.5
    assert found["5 per class"]["std"] == pytest.approx(spread)
    assert found["5 per class"]["images"] == [15, 15, 15]
    assert found["20 %"]["std"] == 0.0
    assert len(set(alone)) > 1  # the splits do differ


def test_draws_are_nested_balanced_and_differ_between_seeds():
    labels = np.repeat([4, 9, 2], [7, 5, 30])
    drawn = draw_per_class(labels, [1, 2, 5], seed=1)
    for n, rows in drawn.items():
        assert np.unique(labels[rows], return_counts=True)[1].tolist() == [n] * 3
        assert len(set(rows.tolist())) == 3 * n
    assert set(drawn[1]) < set(drawn[2]) < set(drawn[5])
    assert drawn[5].tolist() == draw_per_class(labels, [1, 2, 5], seed=1)[5].tolist()
    assert drawn[5].tolist() != draw_per_class(labels, [1, 2, 5], seed=2)[5].tolist()
    with pytest.raises(ValueError, match="class 9 has only 5"):
        draw_per_class(labels, [6], seed=1)


def test_one_percent_as_imagenets():
    labels = np.repeat(np.arange(50), 1281)
    labels = labels[: -(50 * 1281 - 64031)]  # 64,031 images: 1 % are 640
    counts = np.bincount(labels[draw_fraction(labels, 0.01, seed=0)])
    assert counts.sum() == 640
    assert set(counts) <= {12, 13}
    small = draw_fraction(np.repeat([0, 1], [3, 40]), 0.01, seed=0)
    assert len(small) == 2  # one of each at least
    with pytest.raises(ValueError, match="fraction=0"):
        draw_fraction(labels, 0, seed=0)


@pytest.fixture
def msn_folder(tmp_path):
    """Three subsets of two classes as published, with the misnamed file of the third."""
    files = [f"/data/train/{c}/{c}_{i}.JPEG" for c in ("n01", "n02") for i in range(30)]
    for subset in (1, 2, 3):
        folder = tmp_path / f"imagenet_subsets{subset}"
        folder.mkdir()
        for n in (1, 2, 5):
            lines = [f"{c}_{10 * (subset - 1) + i}.JPEG" for i in range(n) for c in ("n02", "n01")]
            name = "3imgs_class.txt" if (subset, n) == (3, 5) else f"{n}imgs_class.txt"
            (folder / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "imagenet_subsets1" / "1percent.txt").write_text("n01_7.JPEG\nn02_3.JPEG")
    return tmp_path, files


def test_published_lists_and_the_misnamed_one(msn_folder):
    folder, files = msn_folder
    split_files = msn_split_files(folder, [1, 2, 5], 0.01, 3)
    assert [path.name for path in split_files["5 per class"]][2] == "3imgs_class.txt"
    assert {name: len(paths) for name, paths in split_files.items()} == {
        "1 per class": 3,
        "2 per class": 3,
        "5 per class": 3,
        "1 %": 1,
    }
    splits = match_listed(split_files, files)
    assert splits["1 per class"][1].tolist() == [10, 40]
    assert splits["5 per class"][2].tolist() == [*range(20, 25), *range(50, 55)]
    assert splits["1 %"][0].tolist() == [7, 33]
    fewer = msn_split_files(folder, [2], None, 2)
    assert {name: len(paths) for name, paths in fewer.items()} == {"2 per class": 2}


def test_lists_that_do_not_fit(msn_folder, tmp_path):
    folder, files = msn_folder
    with pytest.raises(
        ValueError, match="names 1 images that data.train_path lacks, such as n01_7"
    ):
        match_listed(
            msn_split_files(folder, [], 0.01, 3), [f for f in files if "n01_7.JPEG" not in f]
        )
    with pytest.raises(FileNotFoundError, match="no list of 4 images per class"):
        msn_split_files(folder, [4], 0.01, 3)
    with pytest.raises(FileNotFoundError, match="holds no folder imagenet_subsets1"):
        msn_split_files(folder / "imagenet_subsets1", [1], 0.01, 3)
    with pytest.raises(ValueError, match=r"fraction=0.1 has no list .* use 0.01 .* or null"):
        msn_split_files(folder, [1], 0.1, 3)
    with pytest.raises(FileNotFoundError, match="num_splits=4 exceeds .*: use at most 3"):
        msn_split_files(folder, [1], None, 4)
    (folder / "imagenet_subsets1" / "1percent.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no imagenet_subsets1/1percent.txt: .*=null"):
        msn_split_files(folder, [1], 0.01, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambd": 0}, "lambd=0 must be positive"),
        ({"train_labels": [0, 1]}, "few-shot training: 6 features need as many labels"),
        (
            {"test_features": np.full((2, 8), np.nan), "test_labels": [0, 1]},
            "few-shot test features",
        ),
        ({"train_labels": [3] * 6}, "at least two classes"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, y = _data(6, 3, 1)
    inputs = {"train_features": x, "train_labels": y, "test_features": x, "test_labels": y}
    with pytest.raises(ValueError, match=message):
        few_shot_accuracy(**(inputs | change))
