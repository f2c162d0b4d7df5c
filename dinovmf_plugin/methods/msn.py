"""MSN and MSN-vMF: patch-dropped anchors predict one target view through trained prototypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from omegaconf import DictConfig
from torch import Tensor, nn

from dinovmf_plugin.core import schedules
from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.heads import ProjectionHead
from dinovmf_plugin.core.masking import kept_patches
from dinovmf_plugin.core.packing import Crops
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses.msn import msn_loss, msn_targets
from dinovmf_plugin.methods.base import DistillationOutput, SelfDistillation
from dinovmf_plugin.methods.crops import features_of_crops, tokens_and_features
from dinovmf_plugin.methods.settings import (
    BatchNorm,
    Centering,
    MethodSettings,
    Normalizing,
    PrototypeCount,
    TeacherTemperature,
    check_vit,
)
from dinovmf_plugin.runs.bounds import Share, Weight
from dinovmf_plugin.runs.settings import Doc
from dinovmf_plugin.training.config import count_devices
from dinovmf_plugin.training.records import StepRecord

__all__ = ["MSN", "MSNSettings", "MSNvMF"]


@dataclass(frozen=True)
class MSNSettings(MethodSettings):
    """``method_kwargs`` of ``msn`` and ``msn_vmf``.

    ``teacher_temperature`` is MSN's temperature times its sharpening: 0.1 * 0.25. ``clip_grad`` is the
    largest *global* norm of the gradients of backbone and head (DINO's is per parameter).
    """

    normalization: Normalizing = "l2"
    centering: Centering = "sinkhorn"
    num_prototypes: PrototypeCount = 1024
    use_bn_in_head: BatchNorm = True
    teacher_temperature: TeacherTemperature = 0.025
    clip_grad: Annotated[Weight, Doc("largest global norm of the gradients; 0: no clipping")] = 3.0
    patch_drop: Annotated[
        Share, Doc("share of the anchor's patches that is dropped (ViT-S/16: 0.15)")
    ] = 0.15
    me_max_weight: Annotated[Weight, Doc("weight of the mean-entropy maximization")] = 1.0
    schedule_stretch: Annotated[
        float, Ge(1), Doc("the cosine is cut off: it would end at this times max_epochs")
    ] = 1.25


class MSN(SelfDistillation):
    """Masked Siamese Networks (arXiv 2204.07141), with both switches of the vMF paper.

    The first large crop is the target, seen whole by the teacher; the second is an anchor of which the
    student sees the patches that ``patch_drop`` leaves (one random subset a batch, the same on every
    rank); the small crops are further anchors, seen whole. Every anchor predicts the target's assignment to
    the *student's* prototypes, which have no EMA copy; the mean assignment of all anchors is kept uniform.

    BatchNorm of both heads is in training mode, its statistics per forward: of the anchors, of the focal
    crops, of the targets; over all ranks with ``sync_batchnorm``, as the recipes have it (GPUs only).

    Differs from upstream: prototypes are part of the module, so that their gradients are averaged over
    ranks like all others (upstream sums them; AdamW divides by their size either way); schedules count
    from 0 as everywhere here (upstream's warm-up is one step ahead); the learning rate follows the
    host's rule lr * batch / 256, and the recipes hold the value that gives the published one.
    """

    settings_class = MSNSettings

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        s = self.settings
        for network in (self.backbone, self.momentum_backbone):
            backbones.resample_positions_as(network, "msn")
        self.head = self.make_head()
        self.momentum_head = self.make_head()
        self.initialize_teacher()
        self.prototypes = Prototypes(
            s.proj_output_dim, s.num_prototypes, s.normalization, s.normalizer_order
        )
        self.centering = make_centering(
            s.centering,
            s.num_prototypes,
            momentum=s.center_momentum,
            iterations=s.sinkhorn_iterations,
        )
        self.initialize_from_checkpoint()

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Check what lies outside ``method_kwargs``."""
        check_vit(cfg)
        super().check_config(cfg)
        if cfg.method_kwargs.use_bn_in_head and cfg.optimizer.batch_size == 1:
            raise ValueError(
                f"optimizer.batch_size=1 is too small for {cfg.method} with "
                "method_kwargs.use_bn_in_head=True: BatchNorm needs at least 2 images a process"
            )
        if cfg.data.num_large_crops != 2:
            raise ValueError(
                f"augmentations give {cfg.data.num_large_crops} large crops, but {cfg.method} needs 2: the "
                "first is the target, the second the anchor (small crops are focal anchors)"
            )
        synchronized = cfg.get("sync_batchnorm") and cfg.method_kwargs.use_bn_in_head
        accelerator = cfg.get("accelerator") or "auto"
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
        if synchronized and on_cpu and count_devices(cfg.devices) > 1:
            raise ValueError(
                f"devices={cfg.devices} on CPUs cannot have sync_batchnorm=True, which PyTorch offers on "
                "GPUs only: use one device, sync_batchnorm=False or method_kwargs.use_bn_in_head=False"
            )

    def make_head(self) -> ProjectionHead:
        """A projection head as the settings describe it; the prototypes are apart."""
        s = self.settings
        return ProjectionHead(
            self.features_dim,
            hidden_dim=s.proj_hidden_dim,
            bottleneck_dim=s.proj_output_dim,
            num_layers=s.proj_num_layers,
            use_bn=s.use_bn_in_head,
        )

    @property
    def student_prototypes(self) -> Prototypes:
        """The prototypes that the student trains, and the teacher uses."""
        return self.prototypes

    def projection(self) -> nn.Module:
        """The student's head as checkpoints name its parts: ``mlp`` and ``last_layer``."""
        return nn.ModuleDict({"mlp": self.head.mlp, "last_layer": self.prototypes})

    # ---- training -------------------------------------------------------------------------------

    def draw_kept_patches(self, images: Tensor) -> Tensor | None:
        """Indices of the anchor's patches that stay, the same for all images and ranks; None for all."""
        rows, cols = backbones.patch_grid(self.backbone, *images.shape[-2:])
        generator = self.step_generator(per_rank=False)
        return kept_patches(rows * cols, self.settings.patch_drop, generator)

    @torch.no_grad()
    def teacher_targets(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets ``(B, K)``, embeddings ``(B, p)`` and features ``(B, D)`` of the target view."""
        (features,) = features_of_crops(self.momentum_backbone, [target])
        embeddings = self.momentum_head(features)
        targets = msn_targets(
            self.centering, self.prototypes, embeddings, self.teacher_temperature()
        )
        return targets, embeddings, features

    def distillation_loss(self, crops: list[Tensor]) -> DistillationOutput:
        """Cross-entropy of the anchors plus ``me_max_weight`` times the mean-entropy gap."""
        s = self.settings
        target, anchor, *focal = crops
        targets, teacher, teacher_features = self.teacher_targets(target)

        # the head per size: anchors and focal crops have BatchNorm statistics of their own
        first = Crops(anchor, keep=self.draw_kept_patches(anchor))
        tokens, views = tokens_and_features(self.backbone, first, focal, each=self.head)
        features = tokens[:, 0]
        anchors = torch.stack(views)
        cross_entropy, gap = msn_loss(anchors, self.prototypes, targets, s.student_temperature)
        self.last_step = StepRecord(
            loss=cross_entropy.detach(),
            targets=targets,
            student_embeddings=anchors.detach(),
            teacher_embeddings=teacher,
            teacher_temperature=s.teacher_temperature,
            student_temperature=s.student_temperature,
        )
        scalars: dict[str, float | Tensor] = {
            "train_cross_entropy": cross_entropy.detach(),
            "train_mean_entropy_gap": gap.detach(),
        }
        loss = cross_entropy + s.me_max_weight * gap
        return DistillationOutput(loss, features, teacher_features, scalars)

    # ---- optimization ---------------------------------------------------------------------------

    def named_parameter_groups(self) -> dict[str, Any]:
        """Group name -> named parameters that the optimizer gets."""
        groups = super().named_parameter_groups()
        return {**groups, "prototypes": self.prototypes.named_parameters()}

    def group_options(self) -> dict[str, dict[str, Any]]:
        """Group name -> what it has of its own: prototypes are not decayed."""
        return {**super().group_options(), "prototypes": {"decay": False}}

    @property
    def schedule_steps(self) -> int:
        """Length of the schedules: they are cut off before their end."""
        return int(self.settings.schedule_stretch * self.total_steps)

    def teacher_momentum(self, step: int) -> float:
        """EMA coefficient after optimizer step ``step``: a straight line, cut off before its end."""
        momentum, step = self.cfg.momentum, self.schedule_step(step)
        return schedules.linear(step, self.schedule_steps, momentum.base_tau, momentum.final_tau)

    def adjust_gradients(self) -> None:
        """Clip the global norm of backbone and head; the prototypes are left alone."""
        if self.settings.clip_grad:
            parameters = [*self.backbone.parameters(), *self.head.parameters()]
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad)


class MSNvMF(MSN):
    """MSN with vMF prototypes: norms are free, and each component has its normalizer (Eqs. 6, 7)."""

    default_settings: ClassVar[dict[str, Any]] = {"normalization": "vmf"}
