"""A whole training step inside the Trainer: DINO-vMF beside lightly's loop and solo-learn's own DINO.

    dino_vmf           the method with its defaults (vmf + probability)
    dino_vmf none      the same step with ``normalization=none``: what the log-normalizer costs
    dino_vmf compiled  the same step with ``performance.compile=True`` (not among the defaults)
    dino_multicrop     DINO as published (none + logit)
    lightly            DINO as lightly's example wires it (optional: pip install lightly)
    host               solo-learn's ``dino`` on the same two views; it has no multi-crop, so only with crops=0

All train the same backbone on the same crops, which come as the loaders give them, and take turns, some
steps at a time. A step is the time from one batch to the next: forward, loss, backward, optimizer, EMA and
Lightning's own work.

    python scripts/benchmark.py step batch=8 output=results/benchmark_step.json
"""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from dinovmf_plugin import host
from dinovmf_plugin.benchmarks.harness import (
    announce,
    graphics_card,
    machine,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.launches import StepLaunches
from dinovmf_plugin.benchmarks.settings import StepSettings
from dinovmf_plugin.benchmarks.step_candidates import (
    CANDIDATES,
    CLASSES,
    available,
    build,
    recipe,
)
from dinovmf_plugin.benchmarks.training import train_quietly

__all__ = ["count", "main", "measure"]


class _Clock(Callback):
    """Seconds from the start of one batch to the start of the next; the first ones warm up."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first, which allocates the optimizer's state."""
        return [b - a for a, b in zip(self.starts[1:-1], self.starts[2:], strict=True)]


class _Operations(Callback):
    """Floating-point operations of the products of the second step."""

    def __init__(self) -> None:
        self._counter: Any = None
        self.total = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.total, self._counter = self._counter.get_total_flops(), None


def _batch(settings: StepSettings) -> list[Any]:
    sizes = [
        pipeline.crop_size
        for pipeline in recipe(settings, CANDIDATES["dino_vmf"]).augmentations
        for _ in range(pipeline.num_crops)
    ]
    generator = torch.Generator().manual_seed(0)
    count = settings.batch

    def placed(x: torch.Tensor) -> torch.Tensor:
        if settings.accelerator != "gpu" or settings.batches == "pageable":
            return x
        return x.cuda() if settings.batches == "device" else x.pin_memory()

    crops = [torch.randn(count, 3, size, size, generator=generator) for size in sizes]
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [placed(torch.arange(count)), [placed(crop) for crop in crops], placed(labels)]


def _train(
    settings: StepSettings, module: LightningModule, batch: list[Any], steps: int, watch: Callback
) -> None:
    loader: Any = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    train_quietly(
        module, loader, watch, accelerator=settings.accelerator, precision=settings.precision
    )


def count(settings: StepSettings, module: LightningModule, batch: list[Any]) -> dict[str, Any]:
    """What one step asks for, by the dispatcher: ``launches``, ``waits`` and ``flops`` of its products.

    None for compiled modules, whose operations the dispatcher does not see.
    """
    if getattr(getattr(module, "backbone", None), "packed_block", None) is not None:
        return {"launches": None, "waits": None, "flops": None}
    launches, operations = StepLaunches(), _Operations()
    _train(settings, module, batch, 3, launches)
    _train(settings, module, batch, 3, operations)
    return {"launches": launches.total, "waits": launches.waits, "flops": operations.total}


def measure(settings: StepSettings) -> dict[str, Any]:
    """Seconds per step of every candidate.

    Args:
        settings: of the topic.

    Returns:
        ``seconds`` (all), their ``median``, ``ratio`` (the median of dino_vmf over each other
        candidate's), ``images_per_second``, ``counts`` (see ``count``), on a GPU also ``peak_mb`` and
        ``share`` of the card's peak, by candidate.
    """
    names = available(settings.candidates, settings.crops)
    modules = {name: build(settings, name) for name in names}
    batch = _batch(settings)
    on_gpu = settings.accelerator == "gpu"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for turn in range(settings.rounds):
        # every other turn in reverse order: a machine that slows down does not favor the first
        for name in names if turn % 2 == 0 else reversed(names):
            clock = _Clock()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            _train(settings, modules[name], batch, settings.steps + 2, clock)
            seconds[name] += clock.seconds
            if on_gpu:
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 1e6)
            modules[name].cpu()  # the next candidate has the device for itself
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours = median["dino_vmf"]
    counts = {name: count(settings, modules[name], batch) for name in names}
    result: dict[str, Any] = {
        "seconds": seconds,
        "median": median,
        "ratio": {name: ours / value for name, value in median.items() if name != "dino_vmf"},
        "images_per_second": {name: settings.batch / value for name, value in median.items()},
        "counts": counts,
    }
    if on_gpu:
        # a compiled step makes the same products
        flops = {name: counts[name]["flops"] or counts["dino_vmf"]["flops"] for name in names}
        peak = settings.peak_tflops * 1e12
        result["share"] = {name: flops[name] / median[name] / peak for name in names}
        result["peak_mb"] = peaks
    return result


def _line(name: str, result: dict[str, Any]) -> str:
    line = f"  {name:18s}{result['median'][name]:9.4f} s per step"
    line += f"{result['images_per_second'][name]:9.1f} images/s"
    launches = result["counts"][name]["launches"]
    line += f"{launches:7d} launches" if launches is not None else " " * 16
    if "share" in result:
        line += f"{100 * result['share'][name]:6.1f} % of peak{result['peak_mb'][name]:8.0f} MB"
    if name in result["ratio"]:
        line += f"   dino_vmf takes {result['ratio'][name]:.3f} of it"
    return line


def main(argv: list[str]) -> None:
    """Print seconds per step and ratios; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``StepSettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(StepSettings, argv)
    about = {
        **machine(),
        "gpu": graphics_card("accelerator", settings.accelerator),
        "lightning": version("lightning"),
        "solo_learn": host.GENERATION,
    }
    announce(about)
    result = measure(settings)
    for name in result["median"]:
        print(_line(name, result))
    write_report("step", argv, settings, about, {"results": result})
