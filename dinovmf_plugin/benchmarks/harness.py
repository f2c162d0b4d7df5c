"""What a benchmark needs besides its candidates: settings, the machine, peak memory, the report."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import pickle
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinovmf_plugin.benchmarks.settings import BenchmarkSettings
from dinovmf_plugin.runs.files import write_json
from dinovmf_plugin.runs.settings import read_arguments

__all__ = [
    "allocator",
    "announce",
    "graphics_card",
    "in_own_process",
    "installed_candidates",
    "machine",
    "peak_growth",
    "read_settings",
    "write_report",
]

SettingsT = TypeVar("SettingsT", bound=BenchmarkSettings)


def read_settings(kind: type[SettingsT], argv: list[str]) -> SettingsT:
    """Settings of a topic from its ``key=value`` arguments.

    Raises:
        ValueError: in one sentence, for what ``runs.settings.read_arguments`` refuses.
        FileExistsError: if a file that would be written exists.
    """
    settings = read_arguments(kind, argv)
    for key in ("output", "figure"):
        path = getattr(settings, key, None)
        if path and Path(path).exists():
            raise FileExistsError(f"{key}={path} exists: remove it or choose another name")
    return settings


def installed_candidates(names: Sequence[str], packages: Mapping[str, str]) -> list[str]:
    """The candidates whose package is there; who is left out is printed.

    Args:
        names: candidates.
        packages: what pip installs, for candidates that are modules of other projects.

    Example:
        >>> installed_candidates(["ours", "torch"], {"torch": "torch"})
        ['ours', 'torch']
    """
    missing = [name for name in names if name in packages and not importlib.util.find_spec(name)]
    for name in missing:
        print(
            f"{name} is not installed: left out (pip install {packages[name]}, to compare with it)"
        )
    return [name for name in names if name not in missing]


def graphics_card(key: str, device: str) -> str | None:
    """Name of the GPU that ``key=device`` asks for; None for the CPU.

    Raises:
        ValueError: if there is none.
    """
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise ValueError(f"{key}={device} needs a CUDA device, and there is none: set {key}=cpu")
    return torch.cuda.get_device_name()


def in_own_process(module: str, function: str, *arguments: Any) -> Any:
    """What ``module.function(*arguments)`` returns in a fresh process, as JSON holds it.

    Raises:
        RuntimeError: if it failed, with what it printed.
    """
    call = f"b.{function}(*pickle.load(sys.stdin.buffer))"
    code = f"import json, pickle, sys, {module} as b; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(arguments),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{function} of {module} failed:\n{done.stderr.decode(errors='replace')}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def allocator() -> str:
    """What gives this process its memory: times of large tensors depend on it.

    Example:
        >>> isinstance(allocator(), str)
        True
    """
    name = " ".join(platform.libc_ver()).strip() or "system"
    for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        if "malloc" in library:
            name = Path(library).name
    tuned = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")]
    return " ".join([name, *tuned])


def machine() -> dict[str, Any]:
    """Processor, threads, allocator, load and library versions, as the reports record them."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        cpu = names[0].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _status(key: str) -> int:
    """A memory figure of this process in bytes, from /proc/self/status (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: peak memory can be measured on Linux only")


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which this process's resident set grows, at most, while ``run`` runs.

    The kernel's peak counter is reset first (/proc/self/clear_refs), so that what was resident before
    does not hide the growth. Libraries that ``run`` would load should be loaded before.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def announce(about: Mapping[str, Any]) -> None:
    """Print machine and versions in one line."""
    print(", ".join(f"{key} {value}" for key, value in about.items()))


def write_report(
    topic: str,
    argv: list[str],
    settings: BenchmarkSettings,
    about: Mapping[str, Any],
    found: Mapping[str, Any],
) -> None:
    """Write command, machine, settings and what was found as JSON, if ``output`` names a file."""
    if settings.output:
        kept = [argument for argument in argv if not argument.startswith("output=")]
        told = {key: value for key, value in asdict(settings).items() if key != "output"}
        command = shlex.join(["python", "scripts/benchmark.py", topic, *kept])
        write_json(
            settings.output, {"command": command, "machine": about, "settings": told, **found}
        )
        print(f"written to {settings.output}")
