"""Linear transfer to small data sets: logistic regression, its strength chosen by cross-validation.

Protocol (Ericsson et al. with the paper's change, Table 5 and A.6.3): raw features, softmax regression
with l2 strength from 45 values, ``logspace(-6, 5)``, scikit-learn's ``C = 1 / strength``. The paper
chooses by 5-fold cross-validation on the training set (Ericsson et al. by one validation split), then
fits once on the whole training set. Folds are stratified.

The features' common offset, which is large where CLS tokens are raw, is subtracted before a fit: the
intercept is not penalized, so the optimum is the same, and lbfgs gets there in a fraction of the
iterations. 5,000 x 384 features of 100 classes take 85 s of one core (``results/benchmark_transfer.json``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_info, threadpool_limits
from tqdm import tqdm

from dinovmf_plugin.evaluation.logistic.regression import (
    as_arrays,
    class_scores,
    multinomial_regression,
    quiet_convergence,
)

__all__ = ["WEIGHT_DECAYS", "check_folds", "cross_validated_accuracy"]

WEIGHT_DECAYS: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())
METRICS = ("top1", "mean_per_class")

Array = NDArray[Any]


def _scores_along_path(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    weight_decays: Sequence[float],
    tol: float,
    max_iter: int,
    done: Callable[[], object] = bool,
) -> tuple[list[tuple[float, float]], int]:
    """Scores for every strength, strongest first so that each fit starts close to its solution.

    ``done`` is called after every fit. Both arrays of features are changed.

    Returns:
        ``(top1, mean_per_class)`` in the order of ``weight_decays``, and how many fits were unfinished.
    """
    order = np.argsort(weight_decays)[::-1]
    center = train[0].mean(axis=0)
    for features in (train[0], test[0]):
        features -= center
    classes = len(np.unique(train[1]))
    scores: dict[int, tuple[float, float]] = {}
    unfinished = 0
    model = None
    for position in order:
        step = multinomial_regression(
            weight_decays[position], classes, intercept=True, tol=tol, max_iter=max_iter
        )
        model = step if model is None else model.set_params(C=step.C)
        model.fit(*train)
        unfinished += int(model.n_iter_[0] >= max_iter)
        scores[int(position)] = class_scores(test[1], model.predict(test[0]))
        done()
    return [scores[i] for i in range(len(weight_decays))], unfinished


def _blas_threads() -> int:
    pools = (pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
    return max(pools, default=1)


def check_folds(labels: ArrayLike, folds: int, name: str = "training set") -> None:
    """Refuse labels that would leave a class out of a fold.

    Raises:
        ValueError: if a class has fewer images than there are folds, or there is one class only.
    """
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if folds < 2:
        raise ValueError(f"folds={folds} must be at least 2 (the protocol's is 5)")
    if len(classes) < 2:
        raise ValueError(f"{name}: a classifier needs at least two classes, got {len(classes)}")
    smallest = counts.min()
    if smallest < folds:
        instead = f"use folds={smallest}" if smallest > 1 else "leave this class out"
        raise ValueError(
            f"{name}: class {classes[counts.argmin()]} has {smallest} images, so it would be missing in a "
            f"fold of {folds}-fold cross-validation: give it at least {folds}, or {instead}"
        )


def cross_validated_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    folds: int = 5,
    select: str = "top1",
    seed: int = 0,
    tol: float = 1e-5,
    max_iter: int = 100,
    n_jobs: int | None = None,
    progress: bool = False,
    name: str = "training set",
) -> dict[str, Any]:
    """Test accuracy at the l2 strength that cross-validation on the training set chooses.

    Args:
        train_features: ``(N, D)``, used raw (not scaled; see above for their offset).
        train_labels: ``(N,)`` integers, any values; every class needs at least ``folds`` images.
        test_features: ``(M, D)``; never seen by the choice.
        test_labels: ``(M,)``.
        weight_decays: candidate strengths of ``sum of log-losses + strength / 2 * ||W||^2``.
        folds: stratified folds.
        select: ``top1`` or ``mean_per_class``: the cross-validated score that chooses. Of equal ones
            the stronger regularization wins.
        seed: of the shuffle before the folds are cut.
        tol: of the solver (lbfgs on the mean loss): largest entry of the gradient.
        max_iter: of each fit; fits start from the previous strength's solution.
        n_jobs: folds that run at once, in threads that share the cores; None: as many as BLAS may use
            threads (all cores, or what OMP_NUM_THREADS says).
        progress: show a progress bar.
        name: of the training set, for messages.

    Returns:
        ``top1`` and ``mean_per_class`` on the test set in percent, ``weight_decay`` chosen, ``cv`` with
        the mean score of every strength, and ``unfinished_fits`` that stopped at ``max_iter``.

    Raises:
        ValueError: if inputs do not fit or hold a NaN, a class would be missing in a fold, or a test
            label never occurs in training.

    Differs from upstream: five folds instead of one split (the paper), and from strong to weak
    regularization instead of the other way, which needs fewer iterations.
    """
    x, y = as_arrays(train_features, train_labels, name, np.float64)
    x_test, y_test = as_arrays(test_features, test_labels, f"test set of {name}", np.float64)
    if select not in METRICS:
        raise ValueError(f"select={select!r} must be one of {METRICS}")
    if not len(weight_decays) or min(weight_decays) <= 0:
        raise ValueError("weight_decays must name at least one strength, all positive")
    if n_jobs is not None and n_jobs < 1:
        raise ValueError(f"n_jobs={n_jobs} must be at least 1, or None for one per core")
    check_folds(y, folds, name)
    unknown = np.setdiff1d(y_test, y)
    if len(unknown):
        raise ValueError(f"{name}: test class {unknown[0]} has no training image")

    cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
    fits = folds * len(weight_decays)
    bar = tqdm(total=fits, desc=f"{name}: cross-validation", unit="fit", disable=not progress)

    def fold(fit: Array, held: Array) -> tuple[list[tuple[float, float]], int]:
        parts = (x[fit], y[fit]), (x[held], y[held])
        return _scores_along_path(*parts, weight_decays, tol, max_iter, bar.update)

    # threads, since the solver spends its time in BLAS: nothing is imported anew. Whole folds beside each
    # other waste less than one fold's products cut into pieces.
    allowed = _blas_threads()
    workers = min(folds, n_jobs or allowed)
    with bar, quiet_convergence(), threadpool_limits(max(1, allowed // workers)):
        jobs = (delayed(fold)(*rows) for rows in cut.split(x, y))
        results = Parallel(n_jobs=workers, prefer="threads")(jobs)
    mean = np.mean([scores for scores, _ in results], axis=0)
    column = METRICS.index(select)
    best = max(range(len(weight_decays)), key=lambda i: (mean[i, column], weight_decays[i]))

    stronger = [value for value in weight_decays if value >= weight_decays[best]]
    with quiet_convergence():
        final, unfinished = _scores_along_path(
            (x.copy(), y), (x_test.copy(), y_test), stronger, tol, max_iter
        )
    top1, mean_per_class = final[stronger.index(weight_decays[best])]
    return {
        "top1": top1,
        "mean_per_class": mean_per_class,
        "weight_decay": float(weight_decays[best]),
        "selected_by": f"{folds}-fold cross-validation, {select}",
        "cv": {
            "weight_decay": [float(value) for value in weight_decays],
            "top1": mean[:, 0].tolist(),
            "mean_per_class": mean[:, 1].tolist(),
        },
        "unfinished_fits": sum(count for _, count in results) + unfinished,
        "train_images": len(y),
        "test_images": len(y_test),
        "classes": len(np.unique(y)),
    }
