"""What every test may use: tiny configs, synthetic crops, a quiet Trainer, two real processes."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# the networks of the tests are too small to gain from threads, which several workers would fight for
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]

_TINY: dict[str, Any] = {
    "name": "tiny",
    "method": "dino_vmf",
    "max_epochs": 2,
    "seed": 0,
    "num_nodes": 1,
    "accelerator": "cpu",
    "devices": "1",
    "precision": "32-true",
    "backbone": {
        "name": "vit_nano",
        "kwargs": {
            "img_size": 32,
            "patch_size": 16,
            "drop_path_rate": 0.1,
            "dynamic_img_size": True,
        },
    },
    "data": {
        "dataset": "custom",
        "num_classes": 4,
        "num_large_crops": 2,
        "num_small_crops": 2,
        "train_path": "unused",
        "val_path": None,
        "format": "image_folder",
        "no_labels": False,
    },
    "optimizer": {
        "name": "adamw",
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 0.04,
        "classifier_lr": 0.01,
    },
    "scheduler": {
        "name": "warmup_cosine",
        "warmup_epochs": 0,
        "min_lr": 1e-6,
        "warmup_start_lr": 0.0,
    },
    "momentum": {"base_tau": 0.99, "final_tau": 1.0},
    "checkpoint": {"enabled": False, "dir": "trained_models", "frequency": 1, "keep_prev": False},
    "wandb": {"enabled": False},
    "knn_eval": {"enabled": False, "k": 2, "distance_func": "cosine"},
    "method_kwargs": {
        "num_prototypes": 32,
        "proj_hidden_dim": 24,
        "proj_output_dim": 8,
        "freeze_last_layer": 0,
        "monitor": False,
    },
}


@pytest.fixture
def tiny_cfg() -> Any:
    """Factory of configs that train on both hosts; a dict replaces its whole node.

    ``tiny_cfg("dino_multicrop", max_epochs=1, **{"method_kwargs.clip_grad": 0.3})``
    """

    def make(method: str = "dino_vmf", **overrides: Any) -> DictConfig:
        cfg = OmegaConf.create(copy.deepcopy(_TINY))
        cfg.method = method
        for key, value in overrides.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        return cfg

    return make


@pytest.fixture
def make_crops() -> Any:
    """Factory of one batch ``[indexes, [crops], targets]``: large crops 32 px, small ones 16 px."""

    def make(
        batch: int = 4,
        large: int = 2,
        small: int = 2,
        num_classes: int = 4,
        labeled: bool = True,
        seed: int = 0,
    ) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [32] * large + [16] * small
        crops = [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]
        labels = torch.randint(num_classes, (batch,), generator=generator)
        return [torch.arange(batch), crops, labels if labeled else torch.full_like(labels, -1)]

    return make


@pytest.fixture
def crop_loader(make_crops: Any) -> Any:
    """Factory of a loader of ``steps`` fixed batches; the other arguments are those of ``make_crops``."""

    def make(steps: int = 3, seed: int = 0, **kwargs: Any) -> Any:
        batches = [make_crops(seed=1000 * seed + i, **kwargs) for i in range(steps)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    return make


@pytest.fixture
def build() -> Any:
    """Factory: the plugin's or the host's method of a config, from a fixed seed.

    Neither host lets a config choose the depth of a ViT: all blocks but the first ``depth`` are cut off.
    """

    def make(cfg: DictConfig, seed: int = 0, depth: int | None = 2) -> Any:
        from dinovmf_plugin.pretraining import build_method

        torch.manual_seed(seed)
        module = build_method(cfg)
        for name in ("backbone", "momentum_backbone"):
            network = getattr(module, name, None)
            if hasattr(network, "blocks"):
                network.blocks = network.blocks[:depth]
        return module

    return make


@pytest.fixture
def fit() -> Any:
    """Run ``Trainer.fit`` quietly on the CPU and return the Trainer; data may be lists of batches."""

    def loader(data: Any) -> Any:
        if isinstance(data, list):
            return torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
        return data

    def run(
        module: Any, train: Any, val: Any = None, ckpt_path: Any = None, **trainer_kwargs: Any
    ) -> Any:
        from lightning.pytorch import Trainer

        kwargs = {
            "max_epochs": module.cfg.max_epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **trainer_kwargs,
        }
        trainer = Trainer(**kwargs)
        resume = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
        trainer.fit(module, loader(train), loader(val), **resume)
        return trainer

    return run


_RANK = """
import importlib.util, json, os, sys, traceback, torch
import torch.distributed as dist
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
modules = {}
for line in sys.stdin:
    source, function, call = json.loads(line)
    try:
        if source not in modules:
            spec = importlib.util.spec_from_file_location(f"_ddp_worker{len(modules)}", source)
            modules[source] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[source])
        args, kwargs = torch.load(f"{call}/arguments.pt", weights_only=False)
        result = getattr(modules[source], function)(rank, *args, **kwargs)
    except BaseException:
        result = traceback.format_exc()
        name = f"{call}/error{rank}.pt"
    else:
        name = f"{call}/result{rank}.pt"
    torch.save(result, name + ".tmp")
    os.replace(name + ".tmp", name)
"""


class _Processes:
    """Two gloo processes that stay up for the session, since starting torch costs seconds."""

    WORLD_SIZE = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.calls = 0

    def start(self) -> None:
        home = self.folder / f"group{self.calls}"
        home.mkdir()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        for rank in range(self.WORLD_SIZE):
            with open(home / f"rank{rank}.log", "w") as log:
                command = [sys.executable, "-c", _RANK, str(rank), str(self.WORLD_SIZE), str(home)]
                environment = {**os.environ, "PYTHONPATH": path}
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        text=True,
                        env=environment,
                    )
                )

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.processes = []

    def call(self, function: Any, args: Any, kwargs: Any, timeout: float) -> list[Any]:
        if not self.processes:
            self.start()
        self.calls += 1
        folder = self.folder / f"call{self.calls}"
        folder.mkdir()
        torch.save((args, kwargs), folder / "arguments.pt")
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(
                json.dumps([inspect.getfile(function), function.__name__, str(folder)]) + "\n"
            )
            process.stdin.flush()
        results = [folder / f"result{rank}.pt" for rank in range(self.WORLD_SIZE)]
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in results):
            # one rank that failed leaves the others waiting in a collective: end them all
            errors = [torch.load(path) for path in sorted(folder.glob("error*.pt"))]
            dead = [p.returncode for p in self.processes if p.poll() is not None]
            if errors or dead or time.monotonic() > deadline:
                self.stop()
                logs = [path.read_text() for path in sorted(self.folder.glob("group*/rank*.log"))]
                raise AssertionError(
                    f"{function.__name__} in {self.WORLD_SIZE} processes: exit codes {dead}, {timeout} s\n"
                    + "\n".join(errors or logs)
                )
            time.sleep(0.01)
        return [torch.load(path, weights_only=False) for path in results]


@pytest.fixture(scope="session")
def _processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Processes]:
    processes = _Processes(tmp_path_factory.mktemp("ddp"))
    yield processes
    processes.stop()


@pytest.fixture
def ddp(_processes: _Processes) -> Any:
    """Run a test module's top-level ``function(rank, *args, **kwargs)`` in two real gloo processes.

    The group is ready when the function starts. Returns the results in the order of the ranks. The
    processes import the whole test module: keep what it imports light.
    """

    def run(function: Any, *args: Any, timeout: float = 180, **kwargs: Any) -> list[Any]:
        return _processes.call(function, args, kwargs, timeout)

    return run


@pytest.fixture
def killed_in_epoch_2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Factory: ``killed_in_epoch_2(run)`` calls what records a curve, and ends it in its second epoch."""
    from dinovmf_plugin.training.curve import CurveRecorder

    record = CurveRecorder.on_train_epoch_end

    def dies(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")
        record(self, trainer, pl_module)

    def run(start: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(CurveRecorder, "on_train_epoch_end", dies)
            with pytest.raises(RuntimeError, match="killed"):
                start()

    return run
