"""Images per second of the training loaders: torchvision's worker processes beside DALI's threads.

Both get the same recipe, the same files, the same order and the same number of workers or threads,
and take turns epoch by epoch in one process, so that whatever else the machine does hits both. The
files are JPEGs of ImageNet's size and weight (about 500 x 375 pixels, 110 kB), generated, or a
folder of one's own.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali
import torch
from PIL import Image
from tqdm import tqdm

from dinovmf_plugin.data.module import pretrain_loader
from dinovmf_plugin.data.recipe import shipped_augmentations
from dinovmf_plugin.data.sampling import ResumableLoader

__all__ = ["DEFAULTS", "main", "measure", "write_photos"]

CANDIDATES = {"torchvision": "image_folder", "dali": "dali"}

DEFAULTS: dict[str, Any] = {
    "images": 256,  # files, generated where `folder` is not given
    "batch": 32,
    "workers": 2,  # worker processes of torchvision, threads of DALI
    "rounds": 5,  # epochs of each, taking turns
    "device": "cpu",  # of DALI: cpu or gpu
    "recipe": "dino_multicrop",  # a file of configs/augmentations
    "folder": "",  # images of your own, at any depth
    "output": "",  # JSON file; written only if given, never over an existing one
}


def _enlarged(plane: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(plane.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def write_photos(folder: Path, count: int, *, seed: int = 0) -> None:
    """Writes pictures with a photograph's spectrum, so that they cost what photographs cost.

    Args:
        folder: an existing folder.
        count: number of JPEG files, 500 x 375 pixels, every third upright.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = (500, 375) if index % 3 == 2 else (375, 500)
        picture = np.zeros((height, width, 3), dtype=np.float32)
        for octave in range(9):
            coarse = rng.normal(size=(-(-height >> octave) + 1, -(-width >> octave) + 1, 3))
            plane = np.stack([_enlarged(c, height, width) for c in np.moveaxis(coarse, -1, 0)], -1)
            picture += plane * 1.2**octave
        picture = 127.5 + 50.0 * picture / picture.std()
        pixels = picture.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=95)


def _loader(settings: dict[str, Any], data_format: str, folder: str) -> ResumableLoader:
    data = {"dataset": "custom", "format": data_format, "train_path": folder, "no_labels": True}
    return pretrain_loader(
        {
            "seed": 0,
            "data": {**data, "num_workers": settings["workers"]},
            "dali": {"device": settings["device"]},
            "optimizer": {"batch_size": settings["batch"]},
            "augmentations": shipped_augmentations(settings["recipe"]),
        }
    )


def _epoch(loader: ResumableLoader) -> float:
    """Images per second of one epoch."""
    start = time.perf_counter()
    images = sum(len(indexes) for indexes, _, _ in loader)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def measure(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Images per second of both loaders and their ratio.

    Args:
        settings: as ``DEFAULTS``.
        folder: the images.

    Returns:
        ``images_per_second`` (median, and one number per round) of each, and ``ratio``, the median
        over the rounds of DALI's over torchvision's.
    """
    loaders = {name: _loader(settings, kind, folder) for name, kind in CANDIDATES.items()}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    # The first round starts the workers, builds the pipeline and fills the file cache.
    for turn in tqdm(range(settings["rounds"] + 1), desc="rounds of both loaders", unit="round"):
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


def _parse(argv: list[str]) -> dict[str, Any]:
    settings = dict(DEFAULTS)
    for argument in argv:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not separator or key not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise ValueError(
                f"argument {argument!r} is unknown: write key=value with one of {known}"
            )
        try:
            settings[key] = type(DEFAULTS[key])(value)
        except ValueError:
            kind = type(DEFAULTS[key]).__name__
            raise ValueError(f"{key}={value!r} is not of type {kind}") from None
    for key in ("images", "batch", "workers", "rounds"):
        if settings[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {settings[key]}")
    if settings["output"] and Path(settings["output"]).exists():
        raise FileExistsError(f"output={settings['output']!r} exists already")
    return settings


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")}
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": gpu,
        **packages,
        "dali": nvidia.dali.__version__,
    }


def main(argv: list[str]) -> None:
    """Prints images per second of both loaders; writes JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys as in ``DEFAULTS``.

    Raises:
        ValueError: an unknown key or value.
        FileExistsError: the output exists already.
    """
    settings = _parse(argv)
    machine = _machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    with tempfile.TemporaryDirectory() as folder:
        if not settings["folder"]:
            write_photos(Path(folder), settings["images"])
        result = measure(settings, settings["folder"] or folder)
    for name, rate in result["images_per_second"].items():
        print(f"{name:12s} {rate:8.1f} images/s with {settings['workers']} workers or threads")
    print(
        f"{'ratio':12s} {result['ratio']:8.2f} (dali / torchvision, median of {settings['rounds']} rounds)"
    )
    if settings["output"]:
        command = "python scripts/benchmark.py data " + shlex.join(argv)
        report = {"command": command, "machine": machine, "settings": settings, "results": result}
        Path(settings["output"]).write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {settings['output']}")


if __name__ == "__main__":
    main(sys.argv[1:])
