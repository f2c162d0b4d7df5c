"""A whole training step inside the Trainer: DINO-vMF beside plain DINO and solo-learn's own DINO.

    dino_vmf         the method with its defaults (vmf + probability)
    dino_vmf none    the same step with ``normalization=none``: what the log-normaliser costs
    dino_multicrop   DINO as published (none + logit)
    host             solo-learn's ``dino`` on the same two views; it has no multi-crop, so only with crops=0

All train the same backbone on the same crops in memory, and take turns, some steps at a time. A step is
the time from one batch to the next: forward, loss, backward, optimiser, EMA and Lightning's own work.

    python scripts/benchmark.py step batch=8 output=results/benchmark_step.json
"""

from __future__ import annotations

import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from dinovmf_plugin import host
from dinovmf_plugin.benchmarks.harness import machine, parse_arguments, write_report
from dinovmf_plugin.benchmarks.training import train_quietly
from dinovmf_plugin.pretraining import build_method
from dinovmf_plugin.recipes import Candidate, compose_recipe
from dinovmf_plugin.training.config import parse_cfg

__all__ = ["CANDIDATES", "DEFAULTS", "main", "measure"]

CANDIDATES = {
    "dino_vmf": Candidate("dino_vmf"),
    "dino_vmf none": Candidate("dino_vmf", settings={"normalization": "none"}),
    "dino_multicrop": Candidate("dino_multicrop"),
}
HOST = "host"

DEFAULTS: dict[str, Any] = {
    "batch": 8,  # images
    "crops": 0,  # local crops, besides two global ones
    "backbone": "vit_small",
    "size": 224,  # of global crops; local ones have 96 / 224 of it, in whole patches
    "prototypes": 65536,
    "precision": "32-true",  # Lightning's
    "accelerator": "cpu",  # cpu | gpu
    "rounds": 5,  # turns of each candidate
    "steps": 4,  # measured steps of a turn; one more warms up
    "output": "",  # JSON file; written only if given, never over an existing one
}
_PATCH = 16
_CLASSES = 1000
_HOST_KWARGS = (
    "proj_hidden_dim",
    "proj_output_dim",
    "num_prototypes",
    "use_bn_in_head",
    "clip_grad",
    "freeze_last_layer",
    "student_temperature",
    "teacher_temperature",
    "warmup_teacher_temperature",
    "warmup_teacher_temperature_epochs",
)


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
        """Of all steps but the first, which allocates the optimiser's state."""
        return [b - a for a, b in zip(self.starts[1:-1], self.starts[2:], strict=True)]


def _recipe(settings: dict[str, Any], candidate: Candidate) -> DictConfig:
    crops = settings["crops"]
    overrides = [
        f"augmentations={'dino_multicrop' if crops else 'dino_two_crops'}",
        f"backbone.name={settings['backbone']}",
        f"backbone.kwargs.img_size={settings['size']}",
        f"optimizer.batch_size={settings['batch']}",
        f"method_kwargs.num_prototypes={settings['prototypes']}",
        "method_kwargs.freeze_last_layer=0",
        "++method_kwargs.monitor=False",
        "data.no_labels=True",
        "max_epochs=30",
    ]
    cfg = compose_recipe(
        "custom/dino_vmf", candidate, seed=0, overrides=overrides, data={"train_path": "."}
    )
    for pipeline in cfg.augmentations:
        pipeline.crop_size = settings["size"]
    if crops:
        local = settings["size"] * 96 // 224 // _PATCH * _PATCH
        cfg.augmentations[-1].update({"crop_size": max(local, _PATCH), "num_crops": crops})
    cfg = parse_cfg(cfg)
    cfg.data.num_classes = _CLASSES
    cfg.checkpoint.enabled = False
    return cfg


def _module(settings: dict[str, Any], name: str) -> LightningModule:
    torch.manual_seed(0)
    if name != HOST:
        return build_method(_recipe(settings, CANDIDATES[name]))  # type: ignore[no-any-return]
    cfg = _recipe(settings, CANDIDATES["dino_multicrop"])
    cfg.method = "dino"
    kept = {key: cfg.method_kwargs[key] for key in _HOST_KWARGS}
    cfg.method_kwargs = OmegaConf.create({**kept, "norm_last_layer": False})
    cfg.scheduler.name = "none"
    return build_method(cfg)  # type: ignore[no-any-return]


def _batch(settings: dict[str, Any]) -> list[Any]:
    sizes = [
        pipeline.crop_size
        for pipeline in _recipe(settings, CANDIDATES["dino_vmf"]).augmentations
        for _ in range(pipeline.num_crops)
    ]
    generator = torch.Generator().manual_seed(0)
    count = settings["batch"]
    crops = [torch.randn(count, 3, size, size, generator=generator) for size in sizes]
    return [torch.arange(count), crops, torch.randint(_CLASSES, (count,), generator=generator)]


def _turn(settings: dict[str, Any], module: LightningModule, batch: list[Any]) -> list[float]:
    """Seconds of the measured steps of one short training."""
    clock, steps = _Clock(), settings["steps"] + 2
    loader: Any = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    options = {key: settings[key] for key in ("accelerator", "precision")}
    train_quietly(module, loader, clock, **options)
    return clock.seconds


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step of every candidate.

    Args:
        settings: as ``DEFAULTS``.

    Returns:
        ``seconds`` (all), their ``median`` and ``ratio``, the median of dino_vmf over each other
        candidate's, by candidate.
    """
    names = [*CANDIDATES, *([] if settings["crops"] else [HOST])]
    modules = {name: _module(settings, name) for name in names}
    batch = _batch(settings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(settings["rounds"]):
        # every other turn in reverse order: a machine that slows down does not favour the first
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name] += _turn(settings, modules[name], batch)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours = median["dino_vmf"]
    ratio = {name: ours / value for name, value in median.items() if name != "dino_vmf"}
    return {"seconds": seconds, "median": median, "ratio": ratio}


def _check(settings: dict[str, Any]) -> None:
    for key, low in {"batch": 1, "crops": 0, "size": _PATCH, "rounds": 1, "steps": 1}.items():
        if settings[key] < low:
            raise ValueError(f"{key}={settings[key]} must be at least {low}")


def main(argv: list[str]) -> None:
    """Print seconds per step and ratios; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys as in ``DEFAULTS``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = parse_arguments(argv, DEFAULTS)
    _check(settings)
    on_gpu = settings["accelerator"] == "gpu"
    info = {
        **machine(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "lightning": version("lightning"),
        "solo_learn": host.GENERATION,
    }
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    result = measure(settings)
    for name, value in result["median"].items():
        shown = (
            f"   dino_vmf takes {result['ratio'][name]:.3f} of it"
            if name in result["ratio"]
            else ""
        )
        print(f"  {name:16s}{value:9.4f} s per step{shown}")
    report = {"machine": info, "settings": settings, "results": result}
    write_report("step", argv, report, settings["output"])


if __name__ == "__main__":
    main(sys.argv[1:])
