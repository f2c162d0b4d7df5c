"""The candidates of ``benchmark.py step``: modules that train the same backbone on the same crops."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dinovmf_plugin.benchmarks.harness import installed_candidates
from dinovmf_plugin.benchmarks.settings import PATCH, StepSettings
from dinovmf_plugin.core.vit import forward_tokens
from dinovmf_plugin.pretraining import build_method
from dinovmf_plugin.recipes import Candidate, compose_recipe
from dinovmf_plugin.training.config import parse_cfg

__all__ = ["CANDIDATES", "CLASSES", "HOST", "LIGHTLY", "available", "build", "recipe"]

CANDIDATES = {
    "dino_vmf": Candidate("dino_vmf"),
    "dino_vmf none": Candidate("dino_vmf", settings={"normalization": "none"}),
    "dino_vmf compiled": Candidate("dino_vmf"),
    "dino_multicrop": Candidate("dino_multicrop"),
}
HOST, LIGHTLY = "host", "lightly"
CLASSES = 1000
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


def recipe(settings: StepSettings, candidate: Candidate) -> DictConfig:
    """The config of one of this project's candidates."""
    crops = settings.crops
    overrides = [
        f"augmentations={'dino_multicrop' if crops else 'dino_two_crops'}",
        f"backbone.name={settings.backbone}",
        f"backbone.kwargs.img_size={settings.size}",
        f"optimizer.batch_size={settings.batch}",
        f"method_kwargs.num_prototypes={settings.prototypes}",
        "method_kwargs.freeze_last_layer=0",
        "++method_kwargs.monitor=False",
        "data.no_labels=True",
        "max_epochs=30",
    ]
    cfg = compose_recipe(
        "custom/dino_vmf", candidate, seed=0, overrides=overrides, data={"train_path": "."}
    )
    for pipeline in cfg.augmentations:
        pipeline.crop_size = settings.size
    if crops:
        local = settings.size * 96 // 224 // PATCH * PATCH
        cfg.augmentations[-1].update({"crop_size": max(local, PATCH), "num_crops": crops})
    cfg = parse_cfg(cfg)
    cfg.data.num_classes = CLASSES
    cfg.checkpoint.enabled = False
    return cfg


def available(names: Sequence[str], crops: int) -> list[str]:
    """The candidates that can take part: the host has no multi-crop, lightly may not be installed."""
    possible = [name for name in names if not (crops and name == HOST)]
    return installed_candidates(possible, {LIGHTLY: "lightly"})


def build(settings: StepSettings, name: str) -> LightningModule:
    """The module of a candidate."""
    torch.manual_seed(0)
    if name in CANDIDATES:
        cfg = recipe(settings, CANDIDATES[name])
        OmegaConf.update(cfg, "performance.compile", name.endswith("compiled"), force_add=True)
        return build_method(cfg)  # type: ignore[no-any-return]
    cfg = recipe(settings, CANDIDATES["dino_multicrop"])
    if name == LIGHTLY:
        return LightlyDINO(build_method(cfg).backbone, settings.prototypes)
    cfg.method = "dino"
    kept = {key: cfg.method_kwargs[key] for key in _HOST_KWARGS}
    cfg.method_kwargs = OmegaConf.create({**kept, "norm_last_layer": False})
    cfg.scheduler.name = "none"
    return build_method(cfg)  # type: ignore[no-any-return]


class LightlyDINO(LightningModule):
    """DINO as lightly's own example wires it: its heads, its loss, one forward per view.

    Args:
        backbone: a ViT, of which student and teacher get a copy.
        prototypes: ``K``.
    """

    def __init__(self, backbone: Any, prototypes: int) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        dim = backbone.embed_dim
        self.student, self.teacher = copy.deepcopy(backbone), copy.deepcopy(backbone)
        self.student_head, self.teacher_head = (
            DINOProjectionHead(dim, 2048, 256, prototypes, norm_last_layer=False) for _ in range(2)
        )
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=prototypes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As the example: EMA first, teacher on the global views, student on all."""
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=0.996)
        update_momentum(self.student_head, self.teacher_head, m=0.996)
        _, views, _ = batch
        with torch.no_grad():
            teacher = [
                self.teacher_head(forward_tokens(self.teacher, view)[:, 0]) for view in views[:2]
            ]
        student = [self.student_head(forward_tokens(self.student, view)[:, 0]) for view in views]
        loss: Tensor = self.criterion(teacher, student, epoch=self.current_epoch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with its defaults."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.04)
