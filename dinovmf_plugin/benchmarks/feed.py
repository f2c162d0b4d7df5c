"""Images per second of a training step with and without loading: does the loader keep a GPU busy?

    step         the step alone: the same batch on the device, again and again
    dali         the same step fed by DALI (``data.format=dali``)
    torchvision  the same step fed by torchvision's worker processes
    compiled     the step alone with ``performance.compile=True``

and the two loaders alone. Steps run inside Lightning's Trainer with the recipe's crops, loss, optimizer
and EMA; the files are those of ``benchmark.py data``.

    python scripts/benchmark.py feed device=gpu precision=bf16-mixed workers=16 output=results/feed.json
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from dinovmf_plugin.benchmarks.harness import (
    announce,
    graphics_card,
    machine,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.photos import write_photos
from dinovmf_plugin.benchmarks.settings import FeedSettings
from dinovmf_plugin.benchmarks.training import train_quietly
from dinovmf_plugin.data.module import pretrain_loader
from dinovmf_plugin.pretraining import build_method
from dinovmf_plugin.recipes import Candidate, compose_recipe
from dinovmf_plugin.training.config import parse_cfg

__all__ = ["main", "measure"]

_FORMATS = {"dali": "dali", "torchvision": "image_folder"}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Window(Callback):
    """Seconds of the measured steps; the device is waited for at both ends only."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.began, self.seconds = warmup, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if index == self.warmup:
            _wait()
            self.began = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        _wait()
        self.seconds = time.perf_counter() - self.began


class _Steps:
    """The first ``steps`` batches of a loader."""

    def __init__(self, batches: Iterable[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.steps)


def _recipe(settings: FeedSettings, folder: str) -> DictConfig:
    overrides = [
        f"optimizer.batch_size={settings.batch}",
        f"dali.device={settings.device}",
        f"data.num_workers={settings.workers}",
        "data.dataset=custom",
        "++data.no_labels=True",
        "data.check_images=none",
        "devices='1'",
        *settings.overrides.split(),
    ]
    cfg = compose_recipe(
        settings.recipe,
        Candidate(None),
        seed=0,
        overrides=overrides,
        data={"train_path": folder},
    )
    cfg.checkpoint.enabled = False
    return parse_cfg(cfg)


def _loader(cfg: DictConfig, name: str) -> Any:
    cfg = cfg.copy()
    cfg.data.format = _FORMATS[name]
    return pretrain_loader(cfg)


def _on_device(batch: list[Any], device: torch.device) -> list[Any]:
    indexes, crops, targets = batch
    return [indexes.to(device), [crop.to(device) for crop in crops], targets.to(device)]


def _train(settings: FeedSettings, cfg: DictConfig, batches: Iterable[Any], compiled: bool) -> Any:
    """Seconds per step, and the bytes that the GPU's allocator handed out at most."""
    steps = settings.warmup + settings.steps
    torch.manual_seed(0)
    cfg = cfg.copy()
    if compiled:
        OmegaConf.update(cfg, "performance.compile", True, force_add=True)
    module: LightningModule = build_method(cfg)
    window = _Window(settings.warmup)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    options = {"accelerator": settings.device, "precision": settings.precision}
    train_quietly(module, _Steps(batches, steps), window, **options)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return window.seconds / settings.steps, peak


def _alone(settings: FeedSettings, loader: Any) -> float:
    """Seconds per batch of a loader that nobody waits for."""
    batches = iter(loader)
    for _ in islice(batches, settings.warmup):
        pass
    _wait()
    began = time.perf_counter()
    count = sum(1 for _ in islice(batches, settings.steps))
    _wait()
    return (time.perf_counter() - began) / count


def measure(settings: FeedSettings, folder: str) -> dict[str, Any]:
    """Images per second of every candidate, and of the loaders alone.

    Args:
        settings: of the topic.
        folder: the images, at least ``(warmup + steps) * batch``.

    Returns:
        ``step_images_per_second`` and ``loader_images_per_second`` by candidate, ``peak_bytes`` (GPU),
        and ``share_of_step``: how much of the speed of the step alone is left with loading.
    """
    cfg = _recipe(settings, folder)
    device = torch.device("cuda" if settings.device == "gpu" else "cpu")
    step: dict[str, float] = {}
    alone: dict[str, float] = {}
    peaks: dict[str, Any] = {}
    held: list[Any] = []
    for name in tqdm(settings.candidates, desc="candidates", unit="candidate"):
        if name in _FORMATS:
            loader = _loader(cfg, name)
            alone[name] = settings.batch / _alone(settings, loader)
            batches: Iterable[Any] = _loader(cfg, name)
        else:
            if not held:
                held = _on_device(next(iter(_loader(cfg, "torchvision"))), device)
            batches = [held] * (settings.warmup + settings.steps)
        seconds, peaks[name] = _train(settings, cfg, batches, name == "compiled")
        step[name] = settings.batch / seconds
    share = {name: step[name] / step["step"] for name in alone if "step" in step}
    return {
        "step_images_per_second": step,
        "loader_images_per_second": alone,
        "share_of_step": share,
        "peak_bytes": peaks,
    }


def _linked(folder: Path, photos: int, count: int) -> None:
    """``count`` names for ``photos`` different files."""
    write_photos(folder, photos)
    files = sorted(folder.iterdir())
    for index in range(photos, count):
        os.link(files[index % photos], folder / f"{index:06d}.jpg")


def main(argv: list[str]) -> None:
    """Print images per second; write JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``FeedSettings``.

    Raises:
        ValueError: an unknown key or value.
        FileExistsError: the output exists already.
    """
    settings = read_settings(FeedSettings, argv)
    about = {**machine(), "gpu": graphics_card("device", settings.device)}
    about |= {name: version(name) for name in ("torchvision", "timm", "lightning")}
    with suppress(PackageNotFoundError):
        about["dali"] = version("nvidia-dali-cuda130")
    announce(about)
    with tempfile.TemporaryDirectory() as folder:
        if not settings.folder:
            count = settings.batch * (settings.warmup + settings.steps)
            _linked(Path(folder), min(settings.photos, count), count)
        result = measure(settings, settings.folder or folder)
    for name, rate in result["step_images_per_second"].items():
        loader = result["loader_images_per_second"].get(name)
        told = f"   loader alone {loader:8.1f}" if loader else ""
        share = result["share_of_step"].get(name)
        told += f"   {100 * share:5.1f} % of the step alone" if share else ""
        print(f"{name:12s} {rate:8.1f} images/s{told}")
    write_report("feed", argv, settings, about, {"results": result})
