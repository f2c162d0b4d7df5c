"""Every method in two gloo processes: losses, centers and gradients of one process on the joined batch."""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

SINKHORN = {"method_kwargs.centering": "sinkhorn"}
BATCHNORM = {"method_kwargs.use_bn_in_head": True}
APART = {
    "method_kwargs.patch_head": "separate",
    "method_kwargs.num_patch_prototypes": 24,
    "method_kwargs.patch_center_tokens": "masked",
}
RATES = {
    "method_kwargs.layer_decay": 0.9,
    "method_kwargs.patch_embed_lr_mult": 0.2,
    "method_kwargs.clip_grad": 1.0,
    "method_kwargs.clip_by": "network",
}
EM = {"method_kwargs.prototype_update": "em"}
CASES = {
    "dino_multicrop": ("dino_multicrop", {}),
    "dino_vmf": ("dino_vmf", {}),
    "dino_vmf-sinkhorn": ("dino_vmf", SINKHORN),
    "dino_vmf-em": ("dino_vmf", EM),
    "dino_vmf-em-from-data": (
        "dino_vmf",
        EM | {"method_kwargs.init_prototypes": "em", "method_kwargs.num_prototypes": 8},
    ),
    "ibot": ("ibot", {}),
    "ibot_vmf": ("ibot_vmf", {}),
    "ibot_vmf-em": ("ibot_vmf", EM),
    "ibot_vmf-sinkhorn": ("ibot_vmf", SINKHORN),
    "ibot-heads-apart": ("ibot", APART),
    "ibot_vmf-heads-apart": ("ibot_vmf", APART | RATES),
    "ibot-heads-apart-sinkhorn": ("ibot", APART | RATES | SINKHORN),
    "ibot_vmf-batchnorm": ("ibot_vmf", BATCHNORM),
    "msn": ("msn", {}),
    "msn_vmf": ("msn_vmf", {}),
    "msn_vmf-batchnorm": ("msn_vmf", BATCHNORM),
}


def _content_masks(images: Tensor) -> Tensor:
    """Masks that follow from the pictures, so that a picture has the same one in any batch."""
    patches = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)
    return patches > 0.06


def _synchronized(self: torch.nn.BatchNorm1d, x: Tensor) -> Tensor:
    """What SyncBatchNorm does, on GPUs only, in training mode; for as many rows on every rank."""
    import torch.distributed.nn.functional as across

    world, rows = torch.distributed.get_world_size(), len(x)
    mean = across.all_reduce(x.mean(dim=0)) / world
    variance = across.all_reduce((x - mean).square().mean(dim=0)) / world
    with torch.no_grad():
        unbiased = variance * rows * world / (rows * world - 1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1
    return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def _train(module: Any, batches: list[Any], **trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Train quietly; return the losses and the final state."""
    from lightning.pytorch import Trainer

    losses, original = [], module.distillation_loss

    def recorded(crops: list[Tensor]) -> Any:
        out = original(crops)
        losses.append(out.loss.detach())
        return out

    module.distillation_loss, module.draw_masks = recorded, _content_masks
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, **quiet, **trainer).fit(
        module, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    return torch.stack(losses), module.state_dict()


def _rank(rank: int, cfg: Any, state: dict[str, Tensor], batches: list[Any]) -> tuple[Any, Any]:
    """One rank under Lightning's DDP strategy: half of every batch."""
    from lightning.pytorch.strategies import DDPStrategy

    from dinovmf_plugin.pretraining import build_method

    module = build_method(OmegaConf.create(cfg))
    for network in (module.backbone, module.momentum_backbone):
        network.blocks = network.blocks[:2]
    module.load_state_dict(state)
    place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    half = slice(2 * rank, 2 * rank + 2)
    mine = [[i[half], [x[half] for x in crops], y[half]] for i, crops, y in batches]
    strategy = DDPStrategy(process_group_backend="gloo")
    with (
        mock.patch.dict(os.environ, place),  # as Lightning's own launcher tells its processes
        mock.patch.object(torch.nn.BatchNorm1d, "forward", _synchronized),
    ):
        losses, state = _train(module, mine, strategy=strategy, devices=2)
    torch.distributed.all_reduce(losses)
    return losses / 2, state


@pytest.mark.parametrize("case", CASES)
def test_fit__two_ddp_processes__equal_the_joined_batch(small_cfg, make_crops, build, ddp, case):
    """Losses, centers, and through SGD the gradients of all parameters."""
    method, overrides = CASES[case]
    cfg = small_cfg(
        method,
        **{
            "backbone.kwargs.drop_path_rate": 0.0,
            "optimizer.name": "sgd",
            "optimizer.lr": 0.005,
            "scheduler.name": "none",
            "momentum.base_tau": 0.5,
            "method_kwargs.use_bn_in_head": False,
            "data.num_small_crops": 1,
            **overrides,
        },
    )
    batches = [make_crops(small=1, seed=step) for step in range(5)]
    if (
        "ibot" in method
    ):  # no masked patch on the first rank in the first step, none at all in the last
        for step, images in ((0, 2), (4, 4)):
            large = batches[step][1][:2]
            for crop in large:
                crop[:images] = -crop[:images].abs()
            assert not any(_content_masks(crop[:images]).any() for crop in large)
        counts = [int(_content_masks(batch[1][0]).sum()) for batch in batches]
        assert counts[0] > 0 < counts[1]
        assert counts[4] == 0
    module = build(cfg)
    start = copy.deepcopy(module.state_dict())
    first, second = ddp(_rank, OmegaConf.to_container(cfg), start, batches)
    losses, joined = _train(module, batches, devices=1)
    torch.testing.assert_close(first[0], losses, rtol=1e-5, atol=1e-5)
    moved = 0.0
    for name, value in joined.items():
        torch.testing.assert_close(first[1][name], second[1][name], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(
            first[1][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-2
