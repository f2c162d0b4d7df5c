"""How long the cross-validated logistic regression of one small data set takes.

Generated features with a decaying spectrum and overlapping classes, as many as a data set of the paper's
Table 5 would give; the whole grid of 45 strengths in 5 folds, then the fit on all of the training set.

    python scripts/benchmark.py transfer rows=5000 dim=384 classes=100 output=results/benchmark_transfer.json
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinovmf_plugin.benchmarks.harness import machine, parse_arguments, write_report
from dinovmf_plugin.evaluation.logistic.transfer import WEIGHT_DECAYS, cross_validated_accuracy

__all__ = ["DEFAULTS", "generated_features", "main"]

DEFAULTS: dict[str, Any] = {
    "rows": 5000,  # training images; a fifth as many for the test
    "dim": 384,
    "classes": 100,
    "values": 45,  # strengths, evenly out of the protocol's 45
    "folds": 5,
    "n_jobs": "1,2",  # folds at once, in threads that share the cores, comma-separated
    "output": "",  # JSON file; written only if given, never over an existing one
}


def generated_features(
    rows: int, dim: int, classes: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features ``(rows, dim)`` around class centres, coordinate ``i`` with deviation ``1 / sqrt(i)``.

    All coordinates are mixed by a rotation, and scaled to a deviation of 1 on average, as after a
    LayerNorm. Centres and rotation do not depend on ``seed``.
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
        argv: ``key=value`` arguments, keys as in ``DEFAULTS``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = parse_arguments(argv, DEFAULTS)
    for key in ("rows", "dim", "classes", "values"):
        if settings[key] < 1:
            raise ValueError(f"{key}={settings[key]} must be at least 1")
    jobs = settings["n_jobs"].split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in jobs):
        raise ValueError(f"n_jobs={settings['n_jobs']!r} must be numbers of folds at once, as 1,2")
    about = machine() | {"scikit-learn": version("scikit-learn"), "numpy": version("numpy")}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    chosen = np.linspace(0, len(WEIGHT_DECAYS) - 1, settings["values"]).round().astype(int)
    train = generated_features(settings["rows"], settings["dim"], settings["classes"], 1)
    test = generated_features(settings["rows"] // 5, settings["dim"], settings["classes"], 2)
    results = []
    for n in jobs:
        started, computed = time.perf_counter(), time.process_time()
        found = cross_validated_accuracy(
            *train,
            *test,
            weight_decays=[WEIGHT_DECAYS[i] for i in chosen],
            folds=settings["folds"],
            n_jobs=int(n),
        )
        seconds, cpu = time.perf_counter() - started, time.process_time() - computed
        kept = {key: found[key] for key in ("top1", "weight_decay", "unfinished_fits")}
        results.append({"n_jobs": int(n), "seconds": seconds, "cpu_seconds": cpu, **kept})
        print(
            f"  n_jobs {n}: {len(chosen)} strengths x {settings['folds']} folds in {seconds:.1f} s "
            f"({cpu:.1f} s of CPU); "
            f"top-1 {found['top1']:.2f} at {found['weight_decay']:.3g}, "
            f"{found['unfinished_fits']} fits unfinished"
        )
    report = {"machine": about, "settings": settings, "results": results}
    write_report("transfer", argv, report, settings["output"])
