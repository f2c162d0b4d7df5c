"""solo-learn 1.0.2 behind main's face: names, defaults, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinovmf_plugin import host
from dinovmf_plugin.host.backbones import vit_nano

pytestmark = pytest.mark.skipif(
    host.GENERATION != "release", reason="tests the adapter for solo-learn 1.0.2"
)


@pytest.fixture
def module(tiny_cfg, build) -> Any:
    return build(tiny_cfg(**{"backbone.name": "vit_tiny"}))


def test_names__encoder_is_backbone(module):
    assert module.encoder is module.backbone
    assert module.momentum_encoder is module.momentum_backbone
    assert module.encoder_name == module.backbone_name == "vit_tiny"
    names = {name.split(".")[0] for name in module.state_dict()}
    assert {"backbone", "momentum_backbone", "head", "momentum_head", "classifier"} <= names
    assert not {"encoder", "momentum_encoder"} & names
    replacement = torch.nn.Linear(2, 2)
    module.encoder = replacement  # as the host's own code writes it
    assert module.backbone is replacement
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = module.no_such_attribute


def test_defaults__mains(tiny_cfg, build):
    cfg = tiny_cfg()
    for key in ("momentum", "knn_eval", "scheduler.min_lr", "scheduler.warmup_start_lr"):
        OmegaConf.update(cfg, key, None, merge=False)
    cfg.optimizer.classifier_lr = None
    module = build(cfg)
    assert (module.cfg.momentum.base_tau, module.cfg.momentum.final_tau) == (0.99, 1.0)
    assert module.cfg.accumulate_grad_batches == 1
    assert (module.min_lr, module.warmup_start_lr) == (0.0, 3e-5)
    assert module.classifier_lr == 0.1
    assert module.knn_eval is False
    assert module.cfg is cfg  # main fills in the config it is given, too


def test_defaults__given_values_stay(tiny_cfg, build):
    module = build(tiny_cfg(**{"scheduler.min_lr": 0.0, "optimizer.lr": 0.125, "max_epochs": 7}))
    assert (module.min_lr, module.lr, module.max_epochs) == (0.0, 0.125, 7)
    assert module.num_crops == 4
    assert module.scheduler_interval == "step"


def test_accumulation__scales_learning_rates_as_both_hosts_do(tiny_cfg, build):
    module = build(tiny_cfg(accumulate_grad_batches=4))
    assert module.lr == pytest.approx(4e-3)
    assert module.classifier_lr == pytest.approx(0.04)


def test_learnable_params__mains_names(tiny_cfg, build):
    from dinovmf_plugin.host import BaseMomentumMethod

    module = BaseMomentumMethod(tiny_cfg())
    assert [group["name"] for group in module.learnable_params] == ["backbone", "classifier"]
    out = module(torch.randn(2, 3, 32, 32))
    assert out["feats"].shape == (2, module.features_dim)
    assert out["logits"].shape == (2, 4)
    assert module.momentum_forward(torch.randn(2, 3, 32, 32))["feats"].shape == (2, 128)


def test_hooks_of_lightning_1__are_gone(module):
    assert module.validation_epoch_end is None


def test_extra_backbone__does_not_replace_vit_tiny(tiny_cfg, build):
    nano = build(tiny_cfg(), depth=None)
    tiny = build(tiny_cfg(**{"backbone.name": "vit_tiny"}), depth=None)
    assert (nano.features_dim, len(nano.backbone.blocks)) == (128, 4)
    assert (tiny.features_dim, len(tiny.backbone.blocks)) == (192, 12)
    assert nano.backbone_name == "vit_nano"


def test_vit_nano__takes_another_size():
    smaller = vit_nano(patch_size=8, img_size=32, depth=2, embed_dim=64, num_heads=1)
    assert (smaller.embed_dim, len(smaller.blocks)) == (64, 2)
    assert smaller(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
