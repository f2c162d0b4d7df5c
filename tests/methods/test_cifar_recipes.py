"""The recipes of ``configs/cifar``: solo-learn's numbers, and a step on pictures in CIFAR's own files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from dinovmf_plugin.pretraining import pretrain
from dinovmf_plugin.recipes import list_recipes

# recipe -> method, network, normalization
RECIPES = {
    "cifar/dino": ("dino_multicrop", "resnet18", "l2"),
    "cifar/dino_vit": ("dino_multicrop", "vit_tiny", "none"),
    "cifar/dino_vmf": ("dino_vmf", "resnet18", "vmf"),
    "cifar/dino_vmf_vit": ("dino_vmf", "vit_tiny", "vmf"),
    "cifar/ibot_vmf_vit": ("ibot_vmf", "vit_tiny", "vmf"),
    "cifar/msn_vit": ("msn", "vit_tiny", "l2"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 and CIFAR-100 of a few pictures each, as torchvision unpacks them."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    files = {
        "cifar-10-batches-py": (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        "cifar-100-python": ("train", "test"),
    }
    for folder, names in files.items():
        (root / folder).mkdir()
        for name in names:
            pixels = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
            labels = "labels" if "10-" in folder else "fine_labels"
            content = pickle.dumps({"data": pixels, labels: [0, 1, 2, 3]})
            (root / folder / name).write_bytes(content)
    names = pickle.dumps({"label_names": list("abcdefghij")})
    (root / "cifar-10-batches-py/batches.meta").write_bytes(names)
    names = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]})
    (root / "cifar-100-python/meta").write_bytes(names)
    return root


def _compose(name: str, *overrides: str) -> Any:
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return compose(name, overrides=list(overrides))


def test_recipes__all_are_tested_and_tell_what_they_need():
    told = list_recipes()
    assert {name for name in told if name.startswith("cifar/")} == set(RECIPES)
    for name in RECIPES:
        assert "CIFAR-10" in told[name]
        assert "data.train_path=DIR" in told[name]


def test_recipe__dino__the_numbers_of_solo_learns():
    """``scripts/pretrain/cifar/dino.yaml`` and the defaults of its DINO."""
    cfg = _compose("cifar/dino")
    kwargs = {
        "proj_hidden_dim": 2048,
        "proj_output_dim": 256,
        "num_prototypes": 4096,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "warmup_teacher_temperature": 0.04,
        "warmup_teacher_temperature_epochs": 0,
        "clip_grad": 0,
        "freeze_last_layer": 1,
        "normalization": "l2",  # norm_last_layer: True
        "centering": "logit",
        "final_weight_decay": None,
    }
    assert {key: cfg.method_kwargs[key] for key in kwargs} == kwargs
    assert OmegaConf.to_container(cfg.momentum) == {"base_tau": 0.9995, "final_tau": 1.0}
    assert OmegaConf.to_container(cfg.optimizer) == {
        "name": "lars",
        "batch_size": 256,
        "lr": 0.3,
        "classifier_lr": 0.1,
        "weight_decay": 1e-6,
        "kwargs": {"clip_lr": True, "eta": 0.02, "exclude_bias_n_norm": True},
    }
    assert OmegaConf.to_container(cfg.scheduler) == {
        "name": "warmup_cosine",
        "interval": "step",
        "warmup_epochs": 10,
        "warmup_start_lr": 3e-5,
        "min_lr": 0.0,
    }
    assert (cfg.max_epochs, cfg.seed, cfg.auto_resume.enabled) == (1000, 5, True)
    assert (cfg.data.dataset, cfg.data.format) == ("cifar10", "image_folder")
    first, second = cfg.augmentations
    assert (first.solarization.prob, second.solarization.prob) == (0.0, 0.2)
    second.solarization.prob = 0.0
    assert first == second
    assert (first.crop_size, first.rrc.crop_min_scale, first.gaussian_blur.prob) == (32, 0.08, 0.0)


class _Seen(Callback):
    module: Any = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.module, self.loss = pl_module, trainer.callback_metrics["train_loss"]
        self.steps = trainer.global_step


@pytest.mark.parametrize(
    ("name", "data"),
    [*((name, "cifar10") for name in RECIPES), ("cifar/dino_vmf", "cifar100")],
)
def test_recipe__trains_one_step(name, data, pictures, tmp_path, monkeypatch):
    # the files above are not those whose sums torchvision knows
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("nothing is downloaded"))
    cfg = _compose(
        name,
        f"data={data}",
        f"data.train_path={pictures}",
        f"data.val_path={pictures}",
        f"checkpoint.dir={tmp_path}",
        "data.num_workers=0",
        "optimizer.batch_size=2",
        "max_epochs=1",
        "scheduler.warmup_epochs=0",
        "accelerator=cpu",
        "method_kwargs.proj_hidden_dim=16",
        "method_kwargs.num_prototypes=48",
        "+limit_train_batches=1",
        "+limit_val_batches=1",
        "+enable_progress_bar=False",
        "+enable_model_summary=False",
    )
    seen = _Seen()
    checkpoint = pretrain(cfg, [seen])
    method, network, normalization = RECIPES[name]
    assert seen.steps == 1
    assert bool(torch.isfinite(seen.loss))
    module = seen.module
    assert (module.cfg.method, module.cfg.backbone.name) == (method, network)
    assert module.cfg.data.num_classes == int(data.removeprefix("cifar"))
    prototypes = [m for m in module.modules() if type(m).__name__ == "Prototypes"]
    assert {p.normalization for p in prototypes} == {normalization}
    if network == "resnet18":
        assert module.backbone.conv1.kernel_size == (3, 3)
        assert type(module.optimizers().optimizer).__name__ == "LARS"
    else:
        assert module.backbone.pos_embed.shape == (1, 1 + 64, 192)
    assert checkpoint is not None
    assert checkpoint.is_file()


def test_recipe__two_epochs__equal_one_and_one_more(pictures, tmp_path, monkeypatch):
    """A ResNet with the stem of small pictures goes on from its checkpoint, bit for bit."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)

    def run(folder: str, epochs: int, *more: str) -> dict[str, Any]:
        cfg = _compose(
            "cifar/dino_vmf",
            f"data.train_path={pictures}",
            "data.val_path=null",
            f"checkpoint.dir={tmp_path / folder}",
            "data.num_workers=0",
            "optimizer.batch_size=2",
            f"max_epochs={epochs}",
            "scheduler.name=none",  # a schedule would depend on max_epochs
            "scheduler.warmup_epochs=0",
            "momentum.base_tau=0.9",
            "momentum.final_tau=0.9",
            "accelerator=cpu",
            "method_kwargs.proj_hidden_dim=16",
            "method_kwargs.num_prototypes=48",
            "+limit_train_batches=1",
            "+enable_progress_bar=False",
            "+enable_model_summary=False",
            *more,
        )
        seen = _Seen()
        path = pretrain(cfg, [seen])
        assert seen.module.backbone.conv1.kernel_size == (3, 3)
        return {"path": path, "steps": seen.steps, "state": seen.module.state_dict()}

    straight, first = run("straight", 2), run("parts", 1)
    second = run("parts", 2, f"resume_from_checkpoint={first['path']}")
    assert (straight["steps"], first["steps"], second["steps"]) == (2, 1, 2)
    for name, value in straight["state"].items():
        assert torch.equal(second["state"][name], value), name
    head = "head.last_layer.weight_v"
    assert not torch.equal(first["state"][head], straight["state"][head])
