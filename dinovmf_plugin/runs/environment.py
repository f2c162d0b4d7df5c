"""What a run ran on: device, machine, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dinovmf_plugin._version import __version__

__all__ = ["machine", "pick_device", "versions"]

_PACKAGES = ("torchvision", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU if there is one, else the CPU; other names are torch's.

    Raises:
        ValueError: if torch does not know the name or the machine lacks the device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here ({str(error).splitlines()[0]}): use auto, cpu or "
            "cuda:N"
        ) from error
    return chosen


def versions() -> dict[str, str]:
    """Versions of this plugin and of the libraries that can move a result."""
    # torch's own string keeps the build (+cu130), which the package's metadata drops
    found = {"dinovmf_plugin": __version__, "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What a duration depends on: processor, cores, threads, GPU.

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'gpu', 'threads']
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
