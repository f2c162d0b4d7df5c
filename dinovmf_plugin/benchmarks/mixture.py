"""The vMF mixture beside a public one and scikit-learn's GaussianMixture: likelihood, time, memory.

Rows are projected Gaussians of ``components`` classes, so that no candidate's model is exactly right; each
candidate gets that number of components, one start and the same stopping rule as far as it has one.

    ours      mixture.VonMisesFisherMixture
    chemomae  chemomae.clustering.VMFMixture: EM in torch, k-means++ seeds, Banerjee's concentrations
    gaussian  sklearn.mixture.GaussianMixture with spherical covariances

Likelihoods are of held-out rows, per row, with respect to the sphere's surface measure. A spherical Gaussian
``N(m, s^2 I)`` restricted to the sphere is the vMF with direction ``m / |m|`` and concentration
``|m| / s^2``, so the Gaussian's are comparable.

    python scripts/benchmark.py mixture shapes=50000x64x32,50000x256x64 output=results/benchmark_mixture.json
"""

from __future__ import annotations

import statistics
import time
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from dinovmf_plugin.benchmarks.harness import (
    announce,
    in_own_process,
    installed_candidates,
    machine,
    peak_growth,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.settings import MixtureSettings
from dinovmf_plugin.mixture import VonMisesFisherMixture

__all__ = ["fit", "main", "measure", "peak_memory", "workload"]

_BLOCK = 65536


def workload(rows: int, dim: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit rows ``(rows, dim)`` in float32 of classes of unequal size and width, and their classes."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((classes, dim), dtype=np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    width = np.geomspace(0.5, 1.5, classes, dtype=np.float32) / dim**0.5
    share = rng.uniform(1, 4, classes)
    labels = rng.choice(classes, rows, p=share / share.sum())
    x = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, _BLOCK):
        of = labels[start : start + _BLOCK]
        noise = rng.standard_normal((len(of), dim), dtype=np.float32)
        part = centers[of] + width[of, None] * noise
        x[start : start + _BLOCK] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return x, labels


def fit(
    name: str, x: NDArray[np.float32], components: int, max_iter: int, seed: int
) -> VonMisesFisherMixture:
    """Fit a candidate; what it found as a vMF mixture of ours, which then scores and predicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if name == "ours":
            return VonMisesFisherMixture(components, max_iter=max_iter, random_state=seed).fit(x)
        if name == "gaussian":
            found = GaussianMixture(
                components, covariance_type="spherical", max_iter=max_iter, random_state=seed
            ).fit(x)
            norms = np.linalg.norm(found.means_, axis=1)
            directions, weights = found.means_ / norms[:, None], found.weights_
            return _as_ours(directions, norms / found.covariances_, weights)
    from chemomae.clustering import VMFMixture

    other = VMFMixture(components, device="cpu", random_state=seed, max_iter=max_iter)
    other.fit(torch.from_numpy(x), chunk=_BLOCK)
    weights = other.logpi.softmax(0).numpy()
    return _as_ours(other.mus.numpy(), other.kappas.numpy(), weights)


def _as_ours(
    directions: NDArray[Any], concentrations: NDArray[Any], weights: NDArray[Any]
) -> VonMisesFisherMixture:
    mixture = VonMisesFisherMixture(len(weights))
    mixture.directions_, mixture.weights_ = directions, weights
    mixture.concentrations_ = np.minimum(concentrations, mixture.max_concentration)
    mixture.n_features_in_ = directions.shape[1]
    return mixture


def measure(
    rows: int, dim: int, components: int, names: list[str], settings: MixtureSettings
) -> dict[str, Any]:
    """Fits of the candidates, taking turns.

    Returns:
        By candidate: ``seconds`` (all), ``median``, ``log_likelihood`` (held out, all) and ``adjusted_rand``
        (of the predicted components and the classes, held out, all).
    """
    x, labels = workload(rows + settings.held_out, dim, components)
    train, held_out, truth = x[:rows], x[rows:], labels[rows:]
    found: dict[str, Any] = {
        name: {"seconds": [], "log_likelihood": [], "adjusted_rand": []} for name in names
    }
    for seed in range(settings.seeds):
        for name in names:
            started = time.perf_counter()
            mixture = fit(name, train, components, settings.max_iter, seed)
            found[name]["seconds"].append(time.perf_counter() - started)
            found[name]["log_likelihood"].append(mixture.score(held_out))
            found[name]["adjusted_rand"].append(
                float(adjusted_rand_score(truth, mixture.predict(held_out)))
            )
    for row in found.values():
        row["median"] = statistics.median(row["seconds"])
    return found


def peak_memory(rows: int, dim: int, components: int, name: str, max_iter: int) -> int:
    """Bytes by which this process grows, at most, in one fit; the rows are there before."""
    fit(name, workload(64, dim, 2)[0], 2, 2, 0)  # brings in the libraries
    x, _ = workload(rows, dim, components)
    return peak_growth(lambda: fit(name, x, components, max_iter, 0))


def main(argv: list[str]) -> None:
    """Print likelihoods, times and peak memory; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``MixtureSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(MixtureSettings, argv)
    names = installed_candidates(settings.candidates, {"chemomae": "chemomae"}) or ["ours"]
    about = machine() | {"scikit-learn": version("scikit-learn")}
    if "chemomae" in names:
        about["chemomae"] = version("chemomae")
    announce(about)
    results = []
    for text in settings.shapes:
        rows, dim, components = shape = [int(number) for number in text.split("x")]
        found = measure(rows, dim, components, names, settings)
        print(f"\n{rows} rows x {dim}, {components} components, {settings.seeds} fits")
        for name, row in found.items():
            peak = ""
            if settings.memory:
                module = "dinovmf_plugin.benchmarks.mixture"
                arguments = (*shape, name, settings.max_iter)
                row["peak_mb"] = in_own_process(module, "peak_memory", *arguments) / 1e6
                peak = f", peak {row['peak_mb']:.0f} MB"
            print(
                f"  {name:9s} log-likelihood {statistics.mean(row['log_likelihood']):9.3f}, adjusted Rand "
                f"{statistics.mean(row['adjusted_rand']):.3f}, {row['median']:.1f} s{peak}"
            )
        results.append({"shape": shape, "candidates": found})
    write_report("mixture", argv, settings, about, {"results": results})
