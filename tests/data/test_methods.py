"""Methods train on batches of either loader: the plugin's on all crops, the host's own on two."""

import importlib.util
import math
from typing import Any

import pytest

from dinovmf_plugin.data.module import pretrain_loader

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
FORMATS = ["image_folder", "dali"] if HAS_DALI else ["image_folder"]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("method", ["dino_vmf", "simclr"])
def test_one_epoch(
    tiny_cfg: Any,
    build: Any,
    fit: Any,
    data_cfg: Any,
    multicrop: Any,
    method: str,
    data_format: str,
) -> None:
    own = method == "simclr"
    pipelines = multicrop[:2] if own else multicrop
    overrides: dict[str, Any] = {
        "max_epochs": 1,
        "data.num_classes": 2,
        "data.num_small_crops": 0 if own else 2,
    }
    if own:
        overrides["method_kwargs"] = {
            "proj_hidden_dim": 16,
            "proj_output_dim": 8,
            "temperature": 0.2,
        }
    module = build(tiny_cfg(method, **overrides))
    loader = pretrain_loader(data_cfg(data__format=data_format, augmentations=pipelines))
    trainer = fit(module, loader)
    assert trainer.global_step == len(loader) == 5
    losses = [float(value) for name, value in trainer.callback_metrics.items() if "loss" in name]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dino_vmf", "ibot_vmf", "msn", "simclr"])
def test_one_epoch__dali_on_the_gpu(
    tiny_cfg: Any, build: Any, fit: Any, data_cfg: Any, multicrop: Any, method: str
) -> None:
    own = method == "simclr"
    overrides: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "gpu",
        "data.num_classes": 2,
        "data.num_small_crops": 0 if own else 2,
    }
    if own:
        overrides["method_kwargs"] = {
            "proj_hidden_dim": 16,
            "proj_output_dim": 8,
            "temperature": 0.2,
        }
    cfg = tiny_cfg(method, **overrides)
    if method == "msn":
        del cfg.method_kwargs["freeze_last_layer"]
    module = build(cfg)
    pipelines = multicrop[:2] if own else multicrop
    loader = pretrain_loader(
        data_cfg(data__format="dali", augmentations=pipelines, dali__device="gpu")
    )
    trainer = fit(module, loader, accelerator="gpu", precision="bf16-mixed")
    assert trainer.global_step == 2 * len(loader) == 10
    losses = [float(value) for name, value in trainer.callback_metrics.items() if "loss" in name]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
