"""How long the cross-validated logistic regression of one small data set takes.

Generated features with a decaying spectrum and overlapping classes, as many as a data set of the paper's
Table 5 would give; the whole grid of 45 strengths in 5 folds, then the fit on all of the training set.

    python scripts/benchmark.py transfer rows=5000 dim=384 classes=100 output=results/benchmark_transfer.json
"""

from __future__ import annotations

import time
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from dinovmf_plugin.benchmarks.harness import announce, machine, read_settings, write_report
from dinovmf_plugin.benchmarks.settings import TransferSettings
from dinovmf_plugin.evaluation.logistic.transfer import WEIGHT_DECAYS, cross_validated_accuracy

__all__ = ["generated_features", "main"]


def generated_features(
    rows: int, dim: int, classes: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features ``(rows, dim)`` around class centers, coordinate ``i`` with deviation ``1 / sqrt(i)``.

    All coordinates are mixed by a rotation, and scaled to a deviation of 1 on average, as after a
    LayerNorm. Centers and rotation do not depend on ``seed``.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centers = fixed.normal(size=(classes, dim))
    rotation, _ = np.linalg.qr(fixed.normal(size=(dim, dim)))
    labels = rng.permutation(np.arange(rows) % classes)
    spectrum = 1 / np.sqrt(np.arange(1, dim + 1))
    features = (centers[labels] + 5 * rng.normal(size=(rows, dim))) * spectrum @ rotation
    return (features / features.std()).astype(np.float32), labels


def main(argv: list[str]) -> None:
    """Print and, if ``output=`` is given, write the times.

    Args:
        argv: ``key=value`` arguments, keys of ``TransferSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(TransferSettings, argv)
    about = machine() | {"scikit-learn": version("scikit-learn"), "numpy": version("numpy")}
    announce(about)
    chosen = np.linspace(0, len(WEIGHT_DECAYS) - 1, settings.values).round().astype(int)
    train = generated_features(settings.rows, settings.dim, settings.classes, 1)
    test = generated_features(settings.rows // 5, settings.dim, settings.classes, 2)
    results = []
    for n in settings.n_jobs:
        started, computed = time.perf_counter(), time.process_time()
        found = cross_validated_accuracy(
            *train,
            *test,
            weight_decays=[WEIGHT_DECAYS[i] for i in chosen],
            folds=settings.folds,
            n_jobs=n,
        )
        seconds, cpu = time.perf_counter() - started, time.process_time() - computed
        kept = {key: found[key] for key in ("top1", "weight_decay", "unfinished_fits")}
        results.append({"n_jobs": n, "seconds": seconds, "cpu_seconds": cpu, **kept})
        print(
            f"  n_jobs {n}: {len(chosen)} strengths x {settings.folds} folds in {seconds:.1f} s "
            f"({cpu:.1f} s of CPU); "
            f"top-1 {found['top1']:.2f} at {found['weight_decay']:.3g}, "
            f"{found['unfinished_fits']} fits unfinished"
        )
    write_report("transfer", argv, settings, about, {"results": results})
