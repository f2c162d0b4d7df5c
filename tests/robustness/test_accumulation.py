"""Gradient accumulation: the big batch where the mathematics allows it, and what differs where not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

METHODS = ["dino_multicrop", "dino_vmf", "ibot", "ibot_vmf", "msn", "msn_vmf"]
# what a loss on half of the batch cannot know of the other half, switched off
SEPARABLE = {
    "backbone.kwargs.drop_path_rate": 0.0,
    "backbone.kwargs.patch_size": 8,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.05,
    "optimizer.classifier_lr": 0.05,
    "scheduler.name": "none",
    "momentum.base_tau": 0.5,
    "method_kwargs.use_bn_in_head": False,
    "method_kwargs.centering": "logit",
    "method_kwargs.center_momentum": 1 - 1e-9,
    "data.num_small_crops": 1,
    "max_epochs": 1,
}


def _content_masks(images: Tensor) -> Tensor:
    """Masks that follow from the pictures, so that a picture has the same one in any batch."""
    patches = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)
    return patches > 0.06


@pytest.fixture
def train(tiny_cfg, build, fit, make_crops) -> Any:
    """Optimizer steps on eight pictures each, whole or in halves; returns the module and how it began."""

    def run(method: str, halves: bool, steps: int = 2, **more: Any) -> Any:
        overrides = {**SEPARABLE, **more}
        if method.startswith("msn"):
            overrides.setdefault("method_kwargs.me_max_weight", 0.0)
        if method.startswith("ibot"):
            overrides["method_kwargs.patch_center_momentum"] = 1 - 1e-9
        cfg = tiny_cfg(method, **overrides)
        if method.startswith("msn"):
            del cfg.method_kwargs["freeze_last_layer"]
        module = build(cfg)
        module.draw_masks = _content_masks
        if method.startswith("msn"):
            module.draw_kept_patches = lambda images: torch.arange(12)
        batches = [make_crops(batch=8, small=1, seed=i) for i in range(steps)]
        if halves:
            parts = (slice(0, 4), slice(4, 8))
            batches = [[i[s], [x[s] for x in c], y[s]] for i, c, y in batches for s in parts]
        start = copy.deepcopy(module.state_dict())
        trainer = fit(module, batches, accumulate_grad_batches=2 if halves else 1)
        assert trainer.global_step == steps
        return module, start

    return run


def _distance(a: Any, b: Any) -> float:
    return max(
        float((value - b.state_dict()[name]).abs().max())
        for name, value in a.state_dict().items()
        if value.is_floating_point() and "center" not in name
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_halves__are_the_batch(method, train):
    """Losses are means over images: student, teacher, schedules and EMA after two steps."""
    (whole, start), (halves, _) = train(method, halves=False), train(method, halves=True)
    moved = max(float((v - start[n]).abs().max()) for n, v in whole.state_dict().items())
    assert moved > 1e-2
    assert _distance(whole, halves) < 1e-5


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("dino_vmf", "method_kwargs.center_momentum", 0.5),
        ("dino_vmf", "method_kwargs.use_bn_in_head", True),
        ("dino_vmf", "method_kwargs.centering", "sinkhorn"),
        ("msn", "method_kwargs.me_max_weight", 1.0),
        ("msn", "method_kwargs.centering", "sinkhorn"),
    ],
)
def test_what_needs_the_whole_batch__differs(method, key, value, train):
    """Guards the documentation: center, BatchNorm, Sinkhorn and me-max are those of a micro-batch."""
    (whole, _), (halves, _) = (train(method, h, **{key: value}) for h in (False, True))
    assert _distance(whole, halves) > 1e-5


def test_center__moves_with_every_micro_batch(train):
    """m (m c + (1 - m) b1) + (1 - m) b2 in place of m c + (1 - m) (b1 + b2) / 2, from c = 0."""
    m = 0.75
    (whole, _), (halves, _) = (
        train("dino_multicrop", h, steps=1, **{"method_kwargs.center_momentum": m})
        for h in (False, True)
    )
    first, _ = train("dino_multicrop", False, steps=1, **{"method_kwargs.center_momentum": 0.0})
    both = first.centering.center  # (b1 + b2) / 2
    torch.testing.assert_close(whole.centering.center, (1 - m) * both)
    # c = (1 - m) (m b1 + b2): with b1 = 2 both - b2, solved for b2 and put back
    b2 = (halves.centering.center / (1 - m) - 2 * m * both) / (1 - m)
    b1 = 2 * both - b2
    again, _ = train("dino_multicrop", True, steps=1, **{"method_kwargs.center_momentum": 0.0})
    torch.testing.assert_close(again.centering.center, b2, rtol=1e-3, atol=1e-5)
    assert (b1 - b2).abs().max() > 1e-3
