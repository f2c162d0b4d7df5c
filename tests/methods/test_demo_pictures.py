"""Twenty steps of ibot, ibot_vmf, msn and msn_vmf on the demo's pictures, by both loaders."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

METHODS = ["ibot", "ibot_vmf", "msn", "msn_vmf"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dinovmf_plugin.data.demo import build

    try:
        metadata.version("animal-mnist")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps animal-mnist")
    folder = tmp_path_factory.mktemp("demo") / "pictures"
    return build(folder, "animal-mnist", fraction=0.05, val_fraction=0.2, progress=False)


def _losses(method: str, data_format: str, pictures: Path, fit: Any) -> list[float]:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from dinovmf_plugin.pretraining import PretrainDataModule, build_method
    from dinovmf_plugin.training.config import parse_cfg

    overrides = [f"method={method}", f"data.train_path={pictures / 'train'}"]
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        cfg = compose("demo_recipe", overrides=overrides)
    OmegaConf.set_struct(cfg, False)
    if method.startswith("msn"):
        cfg.method_kwargs.teacher_temperature = 0.025
        del cfg.method_kwargs["warmup_teacher_temperature"]
        del cfg.method_kwargs["warmup_teacher_temperature_epochs"]
    cfg.merge_with(
        {
            "max_epochs": 1,
            "data": {"format": data_format, "num_workers": 0 if data_format != "dali" else 1},
            "optimizer": {"batch_size": 8, "lr": 0.04},
            "scheduler": {"warmup_epochs": 0},
            "checkpoint": {"enabled": False},
            "method_kwargs": {"monitor": False, "num_prototypes": 64},
        }
    )
    torch.manual_seed(0)
    module = build_method(parse_cfg(cfg))
    losses, original = [], module.distillation_loss

    def recorded(crops: list[Tensor]) -> Any:
        out = original(crops)
        losses.append(out.loss.item())
        return out

    module.distillation_loss = recorded
    data = PretrainDataModule(module.cfg)
    fit(module, data, max_steps=20)
    return losses


def _check(method: str, data_format: str, pictures: Path, fit: Any) -> None:
    losses = torch.tensor(_losses(method, data_format, pictures, fit))
    assert len(losses) == 20
    assert torch.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean() - 0.02


@pytest.mark.parametrize(("method", "data_format"), [("ibot_vmf", "dali"), ("msn", "image_folder")])
def test_demo__twenty_steps__finite_and_falling(method, data_format, pictures, fit):
    if data_format == "dali":
        pytest.importorskip("nvidia.dali")
    _check(method, data_format, pictures, fit)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data_format", ["image_folder", "dali"])
def test_demo__every_method_and_loader__finite_and_falling(method, data_format, pictures, fit):
    if data_format == "dali":
        pytest.importorskip("nvidia.dali")
    _check(method, data_format, pictures, fit)
