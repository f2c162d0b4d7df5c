"""Head's last layer and loss, forward and backward, beside what else one could use.

One run times every candidate on the same tensors in the same process, taking turns, and measures each
one's peak extra memory in a fresh process of its own. ``loss_candidates`` says who takes part.

    python scripts/benchmark.py loss batch=16,64 precision=float32 output=results/benchmark_loss.json
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from dinovmf_plugin.benchmarks.harness import (
    announce,
    graphics_card,
    in_own_process,
    installed_candidates,
    machine,
    peak_growth,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.loss_candidates import Workload
from dinovmf_plugin.benchmarks.settings import LossSettings
from dinovmf_plugin.losses.plan import multiplies_natively

__all__ = ["fresh_peak", "main", "measure", "peak_memory"]


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """How far loss and gradients are apart: the norm of the difference over the norm of ``b``."""
    return {key: float((a[key] - b[key]).norm() / b[key].norm().clamp_min(1e-30)) for key in b}


def _wait(device: str) -> None:
    """Until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(names: list[str], settings: LossSettings, batch: int, half: bool) -> dict[str, Any]:
    """Times of the candidates in turns of changing order, and how far gradients are from ``none``'s.

    Returns:
        ``seconds`` (all), ``median``, ``best``, ``spread`` (slowest over fastest) and ``difference``
        by candidate.
    """
    device = settings.device
    load = Workload(batch, settings.prototypes, settings.dim, settings.crops, half, device)
    steps = {name: load.candidate(name) for name in names}
    first, reference = {}, {}
    difference = {}
    for name, step in steps.items():
        start = time.perf_counter()
        result = step()
        _wait(device)
        first[name] = time.perf_counter() - start
        if name == "none":
            reference = result
        elif reference and result and name != "vmf":
            difference[name] = _difference(result, reference)
    slow = {name for name, s in first.items() if s > settings.slow_seconds}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turns = random.Random(0)
    for repeat in range(settings.repeats):
        # who comes after whom matters (memory just freed, caches): another order every time
        for name in turns.sample(names, len(names)):
            if name in slow and repeat >= 3:
                continue
            gc.collect()
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "median": {name: statistics.median(s) for name, s in seconds.items()},
        "best": {name: min(s) for name, s in seconds.items()},
        "spread": {name: max(s) / min(s) for name, s in seconds.items()},
        "difference": difference,
    }


def peak_memory(name: str, settings: LossSettings, batch: int, half: bool) -> int:
    """Bytes by which this process's resident set grows, at most, in two steps of a candidate.

    A small step first brings in the libraries; then the kernel's peak counter is reset
    (/proc/self/clear_refs), so that what was resident before does not hide the growth. On a GPU it is
    what PyTorch's allocator hands out.
    """
    dim, crops, device = settings.dim, settings.crops, settings.device
    Workload(2, 512, dim, crops, half, device).candidate(name)()
    load = Workload(batch, settings.prototypes, dim, crops, half, device)
    step = load.candidate(name)

    def two_steps() -> None:
        for _ in range(2):
            kept = step()
            del kept

    if device == "cpu":
        return peak_growth(two_steps)
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    two_steps()
    return torch.cuda.max_memory_allocated() - allocated


def fresh_peak(name: str, settings: LossSettings, batch: int, half: bool) -> float:
    """``peak_memory`` in MB (1e6 bytes), on a CPU in a process that did nothing else."""
    if settings.device == "cuda":
        return peak_memory(name, settings, batch, half) / 1e6
    module = "dinovmf_plugin.benchmarks.loss"
    return float(in_own_process(module, "peak_memory", name, settings, batch, half)) / 1e6


def _ratios(values: dict[str, float]) -> dict[str, float]:
    """How many times this project's ``none`` goes into each candidate."""
    none = max(values["none"], 1e-9)
    return {name: value / none for name, value in values.items() if name != "none"}


def _print(row: dict[str, Any]) -> None:
    print(f"\nbatch {row['batch']}, {row['precision']}")
    print(
        f"  {'':10s}{'median s':>10s}{'best s':>10s}{'spread':>8s}{'/ none':>9s}{'peak MB':>10s}"
        f"{'/ none':>9s}"
    )
    for name, seconds in row["median"].items():
        line = f"  {name:10s}{seconds:10.4f}{row['best'][name]:10.4f}{row['spread'][name]:8.2f}"
        line += f"{row['time_ratio'].get(name, 1.0):9.3f}"
        if row["peak_mb"]:
            line += f"{row['peak_mb'][name]:10.0f}{row['peak_ratio'].get(name, 1.0):9.3f}"
        print(line)
    ratio = row["time_ratio"]
    if "products" in ratio:
        print(f"  none takes {1 / ratio['products']:.3f} times as long as the bare products")
    for name, parts in row["difference"].items():
        worst = max(parts, key=lambda key: parts[key])
        print(f"  relative difference of {name} from none: at most {parts[worst]:.1e} ({worst})")


def main(argv: list[str]) -> None:
    """Print a table of times, peak memory and ratios; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``LossSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(LossSettings, argv)
    names = installed_candidates(settings.candidates, {"lightly": "lightly"})
    if "none" not in names:
        names.insert(0, "none")  # everything is compared with it
    device = settings.device
    about = {
        **machine(),
        "gpu": graphics_card("device", device),
        "bf16_products": multiplies_natively(torch.bfloat16, device),
    }
    announce(about)
    rows = []
    for precision in settings.precision:
        for batch in settings.batch:
            half = precision == "bf16"
            row: dict[str, Any] = {"batch": batch, "precision": precision}
            row.update(measure(names, settings, batch, half))
            row["time_ratio"] = _ratios(row["median"])
            peaks = {n: fresh_peak(n, settings, batch, half) for n in names if settings.memory}
            row["peak_mb"] = peaks
            row["peak_ratio"] = _ratios(peaks) if peaks else {}
            _print(row)
            rows.append(row)
    write_report("loss", argv, settings, about, {"results": rows})
