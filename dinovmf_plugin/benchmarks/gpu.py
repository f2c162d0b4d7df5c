"""Everything that wants a GPU, in one command of at most 8 minutes.

    loss     last layer and loss at K 65536: ours, without Triton's kernels, lightly, the bare products
    step     ViT-S/16, 2 x 224 + 10 x 96, bf16: eager and compiled, beside lightly's loop
    host     the same step on two views beside solo-learn's own DINO
    tests    pytest -m gpu
    feed     the compiled step fed by DALI on the GPU, beside the step alone
    data     the loaders alone
    growth   the loss against K and batch

Every part is a command of its own, in a process of its own, with a time of its own; what does not end in
time is stopped and said. The report is written after every part.

    python scripts/benchmark.py gpu output=results/benchmark_gpu.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dinovmf_plugin.benchmarks.harness import announce, machine, read_settings, write_report
from dinovmf_plugin.benchmarks.settings import GpuSettings, Part

__all__ = ["PARTS", "commands", "main", "run_parts"]

_STEP = "step accelerator=gpu precision=bf16-mixed batch=64 rounds=3 steps=6"
# part -> (most seconds, arguments of scripts/benchmark.py)
PARTS: dict[Part, tuple[int, str]] = {
    "loss": (60, "loss device=cuda batch=64 repeats=15 candidates=none,vmf,eager,lightly,products"),
    "step": (120, f"{_STEP} crops=10 candidates=dino_vmf,dino_vmf~compiled,lightly"),
    "host": (50, f"{_STEP} candidates=dino_vmf,host"),
    "tests": (110, ""),
    "feed": (
        100,
        "feed device=gpu precision=bf16-mixed workers={cores} steps=20 candidates=step,compiled,dali "
        "overrides=++performance.compile=True",
    ),
    "data": (60, "data device=gpu workers={cores} rounds=2"),
    "growth": (50, "growth device=cuda precision=bf16 banks= repeats=3"),
}
_LEAST = 15  # seconds that a part must have left to be begun


def commands(names: Sequence[Part], folder: Path) -> dict[str, tuple[int, list[str], Path | None]]:
    """Part -> (most seconds, command, the report that it writes)."""
    found: dict[str, tuple[int, list[str], Path | None]] = {}
    for name in names:
        limit, arguments = PARTS[name]
        if name == "tests":
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
            found[name] = (limit, command, None)
            continue
        words = [word.format(cores=os.cpu_count()).replace("~", " ") for word in arguments.split()]
        report = folder / f"{name}.json"
        module = "dinovmf_plugin.benchmarks.topics"
        code = f"import sys; from {module} import main; main(sys.argv[1:])"
        found[name] = (
            limit,
            [sys.executable, "-c", code, *words, f"output={report}"],
            report,
        )
    return found


def run_parts(
    parts: Mapping[str, tuple[int, list[str], Path | None]],
    seconds: float,
    done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run commands one after the other within a time.

    Args:
        parts: as ``commands`` returns them.
        seconds: for all of them.
        done: called with all results so far after every part.

    Returns:
        By part: ``outcome`` (ok, failed, stopped or left out), ``seconds``, ``report`` (what the part
        wrote) and ``said`` (the end of its output).
    """
    began, results = time.perf_counter(), {}
    for name, (limit, command, report) in parts.items():
        left = seconds - (time.perf_counter() - began)
        if left < min(_LEAST, limit):
            results[name] = {"outcome": "left out", "seconds": 0.0, "report": None, "said": ""}
            done(results)
            continue
        start = time.perf_counter()
        try:
            ended = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=min(limit, left),
                check=False,
            )
            outcome, said = ("failed" if ended.returncode else "ok"), ended.stdout
        except subprocess.TimeoutExpired as error:
            outcome, said = "stopped", error.stdout or b""
        written = report is not None and report.exists()
        results[name] = {
            "outcome": outcome,
            "seconds": time.perf_counter() - start,
            "report": json.loads(report.read_text()) if written and report else None,
            "said": said.decode(errors="replace")[-3000:],
        }
        done(results)
    return results


def main(argv: list[str]) -> None:
    """Run the parts; print what each says and write the report after each.

    Args:
        argv: ``key=value`` arguments, keys of ``GpuSettings``.

    Raises:
        ValueError: for an unknown key or value, or without a CUDA device.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(GpuSettings, argv)
    if not torch.cuda.is_available():
        raise ValueError("topic gpu needs a CUDA device, and there is none")
    about = {**machine(), "gpu": torch.cuda.get_device_name()}
    announce(about)

    def done(results: dict[str, Any]) -> None:
        name, last = list(results.items())[-1]
        print(f"\n{name}: {last['outcome']}, {last['seconds']:.0f} s\n{last['said']}", flush=True)
        write_report("gpu", argv, settings, about, {"results": results})

    with tempfile.TemporaryDirectory() as folder:
        run_parts(commands(settings.parts, Path(folder)), settings.seconds, done)
