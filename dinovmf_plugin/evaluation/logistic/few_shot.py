"""Few-shot accuracy of frozen features: multinomial logistic regression as in MSN.

Protocol (MSN's logistic evaluation; the paper's Tables 3, 12 and 13): CLS before the final norm,
every feature centered by its own mean over the dimensions and l2-normalized, softmax regression without
intercept, ``mean log-loss + lambd / (2 N) * ||W||^2`` with lambd = 0.075; top-1 on the validation set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from dinovmf_plugin.evaluation.logistic.regression import (
    as_arrays,
    multinomial_regression,
    quiet_convergence,
)

__all__ = ["DEFAULT_LAMBD", "center_and_normalize", "few_shot_accuracy", "few_shot_over_splits"]

DEFAULT_LAMBD = 0.075


def center_and_normalize(features: ArrayLike) -> NDArray[np.float64]:
    """Each row minus its own mean over the dimensions, at unit length; float64 ``(N, D)``.

    A constant row has no direction left and becomes zero.

    Example:
        >>> center_and_normalize([[1.0, 3.0], [5.0, 5.0]]).round(3).tolist()
        [[-0.707, 0.707], [0.0, 0.0]]
    """
    rows = np.asarray(features, dtype=np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def few_shot_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    lambd: float = DEFAULT_LAMBD,
    preprocess: bool = True,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> float:
    """Top-1 accuracy in percent of a classifier trained on a few labeled features.

    Args:
        train_features: ``(N, D)``, raw features of the labeled images.
        train_labels: ``(N,)`` integers, any values.
        test_features: ``(M, D)``.
        test_labels: ``(M,)``.
        lambd: MSN's argument: the l2 strength of the *mean* loss is ``lambd / N``, which is
            scikit-learn's ``C = 1 / lambd``.
        preprocess: center and normalize each feature, as the protocol does.
        tol: of the solver (lbfgs on the mean loss): largest entry of the gradient.
        max_iter: of the solver.

    Raises:
        ValueError: if the inputs do not fit or hold a NaN, ``lambd`` is not positive, or there are
            fewer than two classes to learn.

    Differs from upstream: scikit-learn's lbfgs in float64 instead of cyanure; the same optimum.

    Example:
        >>> features = [[3.0, 0.0, 0.1], [0.0, 3.0, 0.0]]
        >>> few_shot_accuracy(features, [4, 9], [[2.0, 0.3, 0.0], [0.1, 1.0, 0.0]], [4, 9])
        100.0
    """
    x, y = as_arrays(train_features, train_labels, "few-shot training", np.float64)
    x_test, y_test = as_arrays(test_features, test_labels, "few-shot test", np.float64)
    if lambd <= 0:
        raise ValueError(f"lambd={lambd} must be positive (the protocol's is {DEFAULT_LAMBD})")
    classes = len(np.unique(y))
    if classes < 2:
        raise ValueError("few-shot training needs images of at least two classes, got one")
    if preprocess:
        x, x_test = center_and_normalize(x), center_and_normalize(x_test)
    model = multinomial_regression(lambd, classes, intercept=False, tol=tol, max_iter=max_iter)
    with quiet_convergence():
        model.fit(x, y)
    return 100.0 * float(np.mean(model.predict(x_test) == y_test))


def few_shot_over_splits(
    features: ArrayLike,
    labels: ArrayLike,
    splits: Mapping[str, Sequence[Sequence[int]]],
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    lambd: float = DEFAULT_LAMBD,
    preprocess: bool = True,
    tol: float = 1e-6,
    max_iter: int = 1000,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the splits of every setting.

    Args:
        features: ``(N, D)`` of all images that any split names.
        labels: ``(N,)``.
        splits: setting (such as ``"1 per class"``) to its splits, each a list of rows.
        test_features: ``(M, D)``.
        test_labels: ``(M,)``.
        lambd: strength of the l2 penalty, as in ``few_shot_accuracy``.
        preprocess: subtract each feature's own mean, then l2-normalize.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
        progress: show a progress bar.

    Returns:
        Per setting ``mean``, ``std`` (of the sample, as over MSN's three splits; 0 for one split) and
        ``accuracy`` (one number per split), all in percent, and ``images`` per split.
    """
    x, y = np.asarray(features), np.asarray(labels)
    results: dict[str, dict[str, Any]] = {}
    total = sum(len(of_setting) for of_setting in splits.values())
    with tqdm(total=total, desc="few-shot", unit="fit", disable=not progress) as bar:
        for setting, of_setting in splits.items():
            accuracy = []
            for rows in of_setting:
                chosen = np.asarray(rows, dtype=np.int64)
                accuracy.append(
                    few_shot_accuracy(
                        x[chosen],
                        y[chosen],
                        test_features,
                        test_labels,
                        lambd=lambd,
                        preprocess=preprocess,
                        tol=tol,
                        max_iter=max_iter,
                    )
                )
                bar.update()
            results[setting] = {
                "mean": float(np.mean(accuracy)),
                "std": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0,
                "accuracy": accuracy,
                "images": [len(rows) for rows in of_setting],
            }
    return results
