"""What the two logistic-regression evaluations share: inputs, the solver's settings, the scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dinovmf_plugin.features.checks import check_features

__all__ = ["as_arrays", "class_scores", "multinomial_regression", "quiet_convergence"]

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]


def as_arrays(
    features: ArrayLike, labels: ArrayLike, name: str, dtype: type
) -> tuple[Floats, Labels]:
    """Features ``(N, D)`` as ``dtype`` and labels ``(N,)`` as numpy arrays, checked.

    Raises:
        ValueError: if they do not fit, are empty or not finite; ``name`` says whose they are.
    """
    check_features(torch.as_tensor(features), torch.as_tensor(labels), name)
    return np.asarray(features, dtype=dtype), np.asarray(labels, dtype=np.int64)


def class_scores(labels: Labels, predicted: Labels) -> tuple[float, float]:
    """Top-1 and mean per-class accuracy (over the classes in ``labels``), in percent.

    Example:
        >>> class_scores(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]))
        (75.0, 50.0)
    """
    right = predicted == labels
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    recall = np.bincount(index, weights=right) / counts
    return 100.0 * float(right.mean()), 100.0 * float(recall.mean())


def multinomial_regression(
    strength: float, num_classes: int, *, intercept: bool, tol: float, max_iter: int
) -> LogisticRegression:
    """Softmax regression that minimizes ``sum of log-losses + strength / 2 * ||W||^2``.

    For two classes scikit-learn fits one vector ``d = w_1 - w_0``; the softmax optimum has ``w_1 = -w_0``
    and so ``||W||^2 = d^2 / 2``: half the strength on ``d`` gives the same classifier.
    """
    effective = strength / 2 if num_classes == 2 else strength
    return LogisticRegression(
        C=1.0 / effective, fit_intercept=intercept, tol=tol, max_iter=max_iter, warm_start=True
    )


@contextmanager
def quiet_convergence() -> Iterator[None]:
    """Silence the warning of each unfinished fit; the results count them instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
