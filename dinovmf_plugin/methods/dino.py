"""DINO with multi-crop, and DINO-vMF: one class, two defaults."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinovmf_plugin.core import schedules
from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.core.targets import teacher_targets
from dinovmf_plugin.losses.dino import dino_loss
from dinovmf_plugin.methods.base import DistillationOutput
from dinovmf_plugin.methods.crops import features_of_crops
from dinovmf_plugin.methods.em import ComponentsByEM
from dinovmf_plugin.methods.settings import DINOSettings
from dinovmf_plugin.training import optimization
from dinovmf_plugin.training.records import StepRecord

__all__ = ["DINOMultiCrop", "DINOvMF"]


class DINOMultiCrop(ComponentsByEM):
    """DINO as published: multi-crop, free or unit prototypes, logit centering.

    ``method_kwargs.normalization`` and ``method_kwargs.centering`` reach all cells of the paper's Table 1.
    Every key is documented in ``methods.settings.DINOSettings``.

    Differs from upstream (solo-learn's ``dino``): any number of crops reaches the loss, in one forward per
    size and one of the head; schedules, clipping and weight decay are those of DINO.
    """

    settings_class = DINOSettings
    head: DINOHead
    momentum_head: DINOHead
    default_settings: ClassVar[dict[str, Any]] = {"normalization": "none", "centering": "logit"}

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        s = self.settings
        self.make_heads()
        self.initialize_teacher()
        self.centering = make_centering(
            s.centering,
            s.num_prototypes,
            momentum=s.center_momentum,
            raw_scores=s.center_raw_scores,
            iterations=s.sinkhorn_iterations,
        )
        self.initialize_from_checkpoint()
        self.make_components()

    def make_heads(self) -> None:
        """The heads of student and teacher."""
        self.head = self.make_head(self.settings.num_prototypes)
        self.momentum_head = self.make_head(self.settings.num_prototypes)

    def make_head(self, num_prototypes: int) -> DINOHead:
        """A projection head as the settings describe it."""
        s = self.settings
        return DINOHead(
            self.features_dim,
            hidden_dim=s.proj_hidden_dim,
            bottleneck_dim=s.proj_output_dim,
            num_prototypes=num_prototypes,
            normalization=s.normalization,
            num_layers=s.proj_num_layers,
            use_bn=s.use_bn_in_head,
            order=s.normalizer_order,
        )

    def teacher_temperature(self) -> float:
        """The teacher's temperature in the current epoch: it warms up."""
        s = self.settings
        return schedules.teacher_temperature(
            self.current_epoch,
            s.warmup_teacher_temperature,
            s.teacher_temperature,
            s.warmup_teacher_temperature_epochs,
        )

    def own_group(self, group: str, name: str) -> tuple[str, dict[str, Any]]:
        """Layers of the backbone, and the last layers where their rate is held at 0."""
        if self.settings.freeze_by == "rate" and name.startswith("last_layer."):
            return "_last_layer", {"last_layer": True}
        return super().own_group(group, name)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, split by weight decay and, where rates differ, by layer."""
        return optimization.split_weight_decay(
            self.named_parameter_groups(),
            self.group_options(),
            self.settings.decay_magnitudes,
            self.own_group,
        )

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Parameters that stay frozen in the first ``freeze_last_layer`` epochs."""
        return [p for layer in self.spread_prototypes for p in layer.parameters()]

    @property
    def _freezes(self) -> bool:
        return self.current_epoch < self.settings.freeze_last_layer

    @property
    def holds_last_layer(self) -> bool:
        """Whether the last layers' learning rate is 0 in this epoch."""
        return self._freezes and self.settings.freeze_by == "rate"

    def adjust_gradients(self) -> None:
        """Clip over the student, per parameter or per network; freeze the last layer in the first epochs."""
        s = self.settings
        clipped: dict[str, list[nn.Parameter]] = {}
        for name, parameters in self.named_parameter_groups().items():
            if name != "classifier":
                network = "backbone" if name == "mask_token" else name
                clipped.setdefault(network, []).extend(p for _, p in parameters)
        if s.clip_by == "network":
            optimization.clip_per_network(clipped.values(), s.clip_grad)
        else:
            every = [p for parameters in clipped.values() for p in parameters]
            optimization.clip_per_parameter(every, s.clip_grad)
        if self._freezes and s.freeze_by == "gradient":
            for parameter in self.last_layer_parameters():
                parameter.grad = None

    def pooled_teacher(self, crops: list[Tensor]) -> Tensor:
        """The teacher's features of crops, ``(rows, D)``."""
        return torch.cat(features_of_crops(self.momentum_backbone, crops))

    @torch.no_grad()
    def teacher_targets(self, crops: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Targets ``(G, B, K)``, embeddings ``(G * B, p)`` and features ``(G * B, D)`` of the globals.

        The center is updated after the targets are formed, so that they use the previous one.
        """
        features = self.pooled_teacher(crops)
        embeddings = self.momentum_head(features)
        targets = self.cls_targets(embeddings)
        return targets.unflatten(0, (len(crops), -1)), embeddings, features

    @torch.no_grad()
    def cls_targets(self, embeddings: Tensor) -> Tensor:
        """Targets ``(rows, K)`` of the teacher's embeddings ``(rows, p)``; then moves the center."""
        self.observe(embeddings)
        prototypes, temperature = self.momentum_head.last_layer, self.teacher_temperature()
        log_normalizer = prototypes.log_normalizer(temperature)
        return teacher_targets(self.centering, prototypes, embeddings, temperature, log_normalizer)

    def distillation_loss(self, crops: list[Tensor]) -> DistillationOutput:
        """DINO's loss over all pairs of one global teacher view and another student view."""
        s = self.settings
        targets, teacher, teacher_features = self.teacher_targets(crops[: self.num_large_crops])
        features = torch.cat(features_of_crops(self.backbone, crops))
        student = self.head(features).unflatten(0, (len(crops), -1))
        loss = dino_loss(student, self.head.last_layer, targets, s.student_temperature)
        temperature = self.teacher_temperature()
        self.last_step = StepRecord(
            loss=loss.detach(),
            targets=targets.flatten(0, 1),
            student_embeddings=student.detach(),
            teacher_embeddings=teacher,
            teacher_temperature=temperature,
            student_temperature=s.student_temperature,
        )
        large = self.num_large_crops * student.shape[1]
        return DistillationOutput(
            loss, features[:large], teacher_features, {"teacher_temperature": temperature}
        )


class DINOvMF(DINOMultiCrop):
    """DINO-vMF: prototypes with vMF normalization, centering in probability space (Eqs. 6, 7, 9)."""

    default_settings: ClassVar[dict[str, Any]] = {
        "normalization": "vmf",
        "centering": "probability",
    }
