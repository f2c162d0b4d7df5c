"""The whole kNN evaluation beside faiss's flat index used for the same job.

The job begins with raw features, as a backbone gives them, and ends with top-1 and top-5 for every k of
the sweep. Both candidates get the same tensors in the same process and take turns; each one's peak
extra memory is measured in a fresh process.

    ours   evaluation.knn.knn_accuracy
    faiss  blocks normalized, added to an IndexFlatIP (faiss-cpu) and searched for the largest k; the
           vote is ours. ``build`` and ``search`` are its two parts.

The bank is sorted by class, as image folders are listed.

    python scripts/benchmark.py knn shapes=200000x384,1280000x768 output=results/benchmark_knn.json
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dinovmf_plugin.benchmarks.harness import (
    announce,
    in_own_process,
    installed_candidates,
    machine,
    peak_growth,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.settings import KnnSettings
from dinovmf_plugin.features.knn import knn_accuracy, vote_ranks

__all__ = ["Workload", "main", "measure", "peak_memory"]

_BLOCK = 65536
_TEMPERATURE = 0.07
Accuracy = dict[int, tuple[float, float]]


class Workload:
    """Raw features of classes that overlap, the bank sorted by class.

    Args:
        rows: of the bank.
        dim: of every feature.
        settings: of the topic.
    """

    def __init__(self, rows: int, dim: int, settings: KnnSettings) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.classes: int = settings.classes
        self.centers = torch.randn(self.classes, dim, generator=self.generator)
        self.ks = list(settings.ks)
        dtype: torch.dtype = getattr(torch, settings.dtype)
        self.bank_labels = self._labels(rows).sort().values
        self.bank = self._features(self.bank_labels, dtype)
        self.query_labels = self._labels(settings.queries)
        self.queries = self._features(self.query_labels, torch.float32)

    def _labels(self, count: int) -> Tensor:
        return torch.randint(self.classes, (count,), generator=self.generator)

    def _features(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        features = torch.empty(len(labels), self.centers.shape[1], dtype=dtype)
        spread = (
            features.shape[1] ** 0.25
        )  # overlap that is neither trivial nor hopeless at any size
        for start in range(0, len(labels), _BLOCK):
            rows = slice(start, start + _BLOCK)
            center = self.centers[labels[rows]]
            features[rows] = center + spread * torch.randn(center.shape, generator=self.generator)
        return features

    def ours(self) -> tuple[Accuracy, dict[str, float]]:
        """Accuracies, and no parts."""
        labels = self.bank_labels, self.query_labels
        inputs = self.bank, labels[0], self.queries, labels[1]
        return knn_accuracy(*inputs, ks=self.ks, temperature=_TEMPERATURE), {}

    def faiss(self) -> tuple[Accuracy, dict[str, float]]:
        """Accuracies, and the seconds of faiss's two parts."""
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        started = time.perf_counter()
        index = faiss.IndexFlatIP(self.bank.shape[1])
        for block in self.bank.split(_BLOCK):
            unit = block.float().numpy().copy()
            faiss.normalize_L2(unit)
            index.add(unit)
        built = time.perf_counter()
        queries = self.queries.numpy().copy()
        faiss.normalize_L2(queries)
        found, ids = index.search(queries, max(self.ks))
        parts = {"build": built - started, "search": time.perf_counter() - built}
        ranks = vote_ranks(
            torch.from_numpy(found),
            self.bank_labels[torch.from_numpy(ids)],
            self.query_labels,
            self.classes,
            ks=sorted(self.ks),
            temperature=_TEMPERATURE,
        )
        accuracy = {
            k: tuple(100 * float((rank < top).double().mean()) for top in (1, min(5, k)))
            for k, rank in ranks.items()
        }
        return accuracy, parts  # type: ignore[return-value]

    def run(self, name: str) -> tuple[Accuracy, dict[str, float]]:
        """One whole evaluation by a candidate."""
        return self.faiss() if name == "faiss" else self.ours()


def measure(rows: int, dim: int, names: list[str], settings: KnnSettings) -> dict[str, Any]:
    """Seconds of the candidates, taking turns.

    Returns:
        ``seconds`` (all) and ``median`` by candidate, ``cpu_median`` (of the seconds that all threads
        together computed, which other programs disturb less), ``parts`` (medians) of faiss, ``accuracy``
        per k and the largest ``difference`` between the candidates' accuracies, in points.
    """
    load = Workload(rows, dim, settings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {}
    accuracy: dict[str, Accuracy] = {}
    for _ in range(settings.repeats):
        for name in names:
            started, computed = time.perf_counter(), time.process_time()
            accuracy[name], of_this = load.run(name)
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - computed)
            for part, value in of_this.items():
                parts.setdefault(part, []).append(value)
    first = accuracy[names[0]]
    apart = [
        abs(a - b)
        for found in accuracy.values()
        for k in first
        for a, b in zip(found[k], first[k], strict=True)
    ]
    return {
        "seconds": seconds,
        "median": {name: statistics.median(values) for name, values in seconds.items()},
        "cpu_median": {name: statistics.median(values) for name, values in cpu.items()},
        "parts": {part: statistics.median(values) for part, values in parts.items()},
        "accuracy": {f"k{k}": {"top1": top[0], "top5": top[1]} for k, top in first.items()},
        "difference": max(apart),
    }


def peak_memory(rows: int, dim: int, name: str, settings: KnnSettings) -> int:
    """Bytes by which this process grows, at most, in one evaluation; the features are there before."""
    few = replace(settings, ks=[1], queries=2, classes=2)
    Workload(64, dim, few).run(name)  # brings in the libraries
    load = Workload(rows, dim, settings)
    return peak_growth(lambda: load.run(name))


def _fresh_peak(rows: int, dim: int, name: str, settings: KnnSettings) -> float:
    """``peak_memory`` in MB (1e6 bytes), in a process that did nothing else."""
    module = "dinovmf_plugin.benchmarks.knn"
    return float(in_own_process(module, "peak_memory", rows, dim, name, settings)) / 1e6


def main(argv: list[str]) -> None:
    """Print times, ratios and peak memory; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``KnnSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(KnnSettings, argv)
    names = installed_candidates(settings.candidates, {"faiss": "faiss-cpu"}) or ["ours"]
    about = machine() | ({"faiss-cpu": version("faiss-cpu")} if "faiss" in names else {})
    announce(about)
    results = []
    for shape in settings.shapes:
        rows, dim = map(int, shape.split("x"))
        row: dict[str, Any] = {"bank": [rows, dim], **measure(rows, dim, names, settings)}
        row["seconds_per_1000_queries"] = {
            name: 1000 * value / settings.queries for name, value in row["median"].items()
        }
        row["peak_mb"] = {
            name: _fresh_peak(rows, dim, name, settings) for name in names if settings.memory
        }
        print(f"\nbank {rows} x {dim} {settings.dtype}, {settings.queries} queries")
        for name, median in row["median"].items():
            peak = f", peak {row['peak_mb'][name]:.0f} MB" if row["peak_mb"] else ""
            print(f"  {name:6s}{median:8.2f} s ({row['cpu_median'][name]:.2f} s of CPU){peak}")
        if {"ours", "faiss"} <= set(names):
            ours, theirs = row["median"]["ours"], row["median"]["faiss"]
            cpu = row["cpu_median"]["faiss"] / row["cpu_median"]["ours"]
            search = row["parts"]["search"] / ours
            row["ratio"] = {"faiss": theirs / ours, "search": search, "cpu": cpu}
            print(
                f"  faiss takes {theirs / ours:.2f} times as long ({cpu:.2f} in CPU time), its search "
                f"alone {search:.2f}; accuracies differ by {row['difference']:.3f} points"
            )
        results.append(row)
    write_report("knn", argv, settings, about, {"results": results})
