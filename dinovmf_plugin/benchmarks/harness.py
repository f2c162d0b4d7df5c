"""What a benchmark needs besides its candidates: arguments, the machine, peak memory, the report."""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "allocator",
    "check_choice",
    "in_own_process",
    "machine",
    "parse_arguments",
    "peak_growth",
    "write_report",
]


def parse_arguments(argv: list[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``key=value`` arguments over ``defaults``, with the types of those.

    Raises:
        ValueError: for an argument that is no ``key=value``, an unknown key or a value of another type.
        FileExistsError: if ``output`` names an existing file.

    Example:
        >>> parse_arguments(["k=20"], {"k": 200, "output": ""})
        {'k': 20, 'output': ''}
    """
    settings = dict(defaults)
    for argument in argv:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not separator or key not in defaults:
            raise ValueError(
                f"argument {argument!r} is unknown: write key=value with one of {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        try:
            settings[key] = kind(value)
        except ValueError:
            raise ValueError(f"{key}={value!r} is not of type {kind.__name__}") from None
    if settings["output"] and Path(settings["output"]).exists():
        raise FileExistsError(
            f"output={settings['output']} exists: remove it or choose another name"
        )
    return settings


def check_choice(settings: Mapping[str, Any], key: str, known: Iterable[str]) -> None:
    """Refuse an entry of a comma-separated setting that is not ``known``.

    Raises:
        ValueError: naming the key, the entry and what there is.
    """
    for value in settings[key].split(","):
        if value not in known:
            raise ValueError(f"{key}={value!r} is unknown: choose from {', '.join(known)}")


def in_own_process(module: str, function: str, *arguments: Any) -> Any:
    """What ``module.function(*arguments)`` returns in a fresh process; both ways as JSON.

    Raises:
        RuntimeError: if it failed, with what it printed.
    """
    call = f"b.{function}(*json.loads({json.dumps(arguments)!r}))"
    code = f"import json, {module} as b; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} of {module} failed:\n{done.stderr}")
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


def write_report(topic: str, argv: list[str], report: Mapping[str, Any], output: str) -> None:
    """Write ``report`` with the command that made it as indented JSON, if ``output`` names a file."""
    if output:
        kept = [argument for argument in argv if not argument.startswith("output=")]
        command = shlex.join(["python", "scripts/benchmark.py", topic, *kept])
        settings = {key: value for key, value in report["settings"].items() if key != "output"}
        content = {"command": command, **report, "settings": settings}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(content, indent=2) + "\n")
        print(f"written to {output}")
