"""Images per second of the training loaders: torchvision's worker processes beside DALI's threads.

Both get the same recipe, the same files, the same order and the same number of workers or threads,
and take turns epoch by epoch in one process, so that whatever else the machine does hits both. The
files are JPEGs of ImageNet's size and weight (about 500 x 375 pixels, 110 kB), generated, or a
folder of one's own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nvidia.dali
import torch
from tqdm import tqdm

from dinovmf_plugin.benchmarks.harness import (
    announce,
    graphics_card,
    machine,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.photos import write_photos
from dinovmf_plugin.benchmarks.settings import DataSettings
from dinovmf_plugin.data.module import pretrain_loader
from dinovmf_plugin.data.recipe import shipped_augmentations
from dinovmf_plugin.data.sampling import ResumableLoader

__all__ = ["main", "measure"]

CANDIDATES = {"torchvision": "image_folder", "dali": "dali"}


def _loader(settings: DataSettings, data_format: str, folder: str) -> ResumableLoader:
    data = {"dataset": "custom", "format": data_format, "train_path": folder, "no_labels": True}
    return pretrain_loader(
        {
            "seed": 0,
            "data": {**data, "num_workers": settings.workers},
            "dali": {"device": settings.device},
            "optimizer": {"batch_size": settings.batch},
            "augmentations": shipped_augmentations(settings.recipe),
        }
    )


def _epoch(loader: ResumableLoader) -> float:
    """Images per second of one epoch."""
    start = time.perf_counter()
    images = sum(len(indexes) for indexes, _, _ in loader)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def measure(settings: DataSettings, folder: str) -> dict[str, Any]:
    """Images per second of both loaders and their ratio.

    Args:
        settings: of the topic.
        folder: the images.

    Returns:
        ``images_per_second`` (median, and one number per round) of each, and ``ratio``, the median
        over the rounds of DALI's over torchvision's.
    """
    loaders = {name: _loader(settings, kind, folder) for name, kind in CANDIDATES.items()}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    # The first round starts the workers, builds the pipeline and fills the file cache.
    for turn in tqdm(range(settings.rounds + 1), desc="rounds of both loaders", unit="round"):
        for name, loader in loaders.items():
            rate = _epoch(loader)
            if turn > 0:
                rates[name].append(rate)
    ratios = [dali / torchvision for torchvision, dali in zip(*rates.values(), strict=True)]
    return {
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "ratio": statistics.median(ratios),
    }


def _about(device: str) -> dict[str, Any]:
    gpu = graphics_card("device", device)
    packages = {name: version(name) for name in ("torchvision", "pillow", "numpy")}
    return {**machine(), "gpu": gpu, **packages, "dali": nvidia.dali.__version__}


def main(argv: list[str]) -> None:
    """Print images per second of both loaders; write JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``DataSettings``.

    Raises:
        ValueError: an unknown key or value.
        FileExistsError: the output exists already.
    """
    settings = read_settings(DataSettings, argv)
    about = _about(settings.device)
    announce(about)
    with tempfile.TemporaryDirectory() as folder:
        if not settings.folder:
            write_photos(Path(folder), settings.images)
        result = measure(settings, settings.folder or folder)
    for name, rate in result["images_per_second"].items():
        print(f"{name:12s} {rate:8.1f} images/s with {settings.workers} workers or threads")
    print(
        f"{'ratio':12s} {result['ratio']:8.2f} (dali / torchvision, median of {settings.rounds} rounds)"
    )
    write_report("data", argv, settings, about, {"results": result})
