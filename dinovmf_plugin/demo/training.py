"""The demo's trainings: side by side, one process and its share of the cores each, or here in turn."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin.data.module import validation_loader
from dinovmf_plugin.features.extraction import extract_features
from dinovmf_plugin.features.knn import knn_accuracy
from dinovmf_plugin.pretraining import pretrain
from dinovmf_plugin.runs.cli import one_clear_message
from dinovmf_plugin.training.config import parse_cfg
from dinovmf_plugin.training.curve import CurveRecorder, read_curve

__all__ = ["TrainingFailedError", "default_processes", "train_all"]


def default_processes(methods: int) -> int:
    """One for each method, at most one for each core that this process may use.

    Example:
        >>> default_processes(1)
        1
    """
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return max(1, min(methods, cores))


class TrainingFailedError(RuntimeError):
    """A training in a process of its own ended early; the message holds the end of its log."""


class _Tell(Callback):
    """One line an epoch, where several trainings share the screen."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        record = read_curve(Path(pl_module.run_folder))[-1]
        knn = f", kNN {record['top1']:.1f} %" if "top1" in record else ""
        print(
            f"{pl_module.cfg.method}: epoch {record['epoch']} of {trainer.max_epochs}, loss "
            f"{record['loss']:.3f}{knn}, {record['seconds']:.0f} s",
            flush=True,
        )


def _train(recipe: DictConfig, every: int, k: int, temperature: float, tell: bool = False) -> Path:
    parsed = parse_cfg(recipe.copy())
    images: dict[bool, list[Any]] = {}

    def top1(network: nn.Module) -> float:
        for train in (True, False) if not images else ():
            loader = validation_loader(parsed, train=train)
            images[train] = [(x.clone(), y.clone()) for x, y in loader]
        (bank, labels), (queries, query_labels) = (
            extract_features(network, images[train], progress=False) for train in (True, False)
        )
        used = min(k, len(bank))
        found = knn_accuracy(
            bank, labels, queries, query_labels, ks=[used], temperature=temperature
        )
        return found[used][0]

    callbacks = [CurveRecorder(top1, every), *([_Tell()] if tell else [])]
    checkpoint = pretrain(recipe, callbacks)
    assert checkpoint is not None
    return checkpoint


def train_all(
    recipes: Mapping[str, DictConfig],
    folder: Path,
    *,
    every: int,
    k: int,
    temperature: float,
    processes: int,
) -> dict[str, Path]:
    """Pre-train every recipe; what was interrupted goes on.

    Args:
        recipes: unparsed, by method.
        folder: for the logs ``METHOD.log`` of processes of their own.
        every: epochs between two kNN evaluations of the curve.
        k: neighbors of the curve.
        temperature: of the kNN votes.
        processes: trainings at a time; 1 trains in this process, one after the other.

    Returns:
        The last checkpoint of every method.

    Raises:
        TrainingFailedError: if a process failed.
    """
    options: dict[str, Any] = {"every": every, "k": k, "temperature": temperature}
    if processes == 1:
        found = {}
        for method, recipe in recipes.items():
            print(f"\n== {method} ==", flush=True)
            found[method] = _train(recipe, **options)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, done = list(recipes), dict[str, "_Training"](), dict[str, Path]()
    with _ending_children(running):
        while waiting or running:
            while waiting and len(running) < processes:
                method = waiting.pop(0)
                running[method] = _Training(method, recipes[method], folder, processes, options)
            time.sleep(0.2)
            for method, training in list(running.items()):
                checkpoint = training.poll()
                if checkpoint is not None:
                    done[method] = checkpoint
                    del running[method]
    return {method: done[method] for method in recipes}


@contextmanager
def _ending_children(running: Mapping[str, _Training]) -> Iterator[None]:
    """No training outlives this process, unless it is killed outright."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        for training in running.values():
            training.process.terminate()  # it saves its step and ends
        for training in running.values():
            training.process.wait()
        signal.signal(signal.SIGTERM, before)


class _Training:
    """One training in a process of its own."""

    def __init__(
        self, method: str, recipe: DictConfig, folder: Path, processes: int, options: dict[str, Any]
    ) -> None:
        self.method = method
        self.log, self.outcome = folder / f"{method}.log", folder / f"{method}.checkpoint"
        file = folder / f"{method}.yaml"
        OmegaConf.save(recipe, file, resolve=True)
        self.outcome.unlink(missing_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        command = [sys.executable, "-m", __name__, str(file), str(self.outcome)]
        command += [f"--{name}={value}" for name, value in options.items()]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": threads}, stderr=log
            )
        print(f"{method}: training with {threads} thread(s); messages in {self.log}", flush=True)

    def poll(self) -> Path | None:
        """The checkpoint once the process has ended."""
        code = self.process.poll()
        if code is None:
            return None
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        if code or not self.outcome.is_file():
            tail = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise TrainingFailedError(
                f"training of {self.method} ended with status {code}:\n" + "\n".join(tail)
            )
        return Path(self.outcome.read_text())


@one_clear_message
def _main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("outcome", type=Path)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    arguments = parser.parse_args()
    recipe = OmegaConf.load(arguments.recipe)
    assert isinstance(recipe, DictConfig)
    OmegaConf.update(recipe, "enable_progress_bar", False, force_add=True)
    checkpoint = _train(recipe, arguments.every, arguments.k, arguments.temperature, tell=True)
    arguments.outcome.write_text(str(checkpoint))


if __name__ == "__main__":
    _main()
