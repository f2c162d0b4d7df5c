"""iBOT and iBOT-vMF: DINO on the CLS token and masked image modeling on patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinovmf_plugin.core import schedules
from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.masking import MaskSampler, MaskShape
from dinovmf_plugin.core.packing import Crops, forward_packed
from dinovmf_plugin.losses.dino import dino_loss
from dinovmf_plugin.losses.ibot import (
    ibot_patch_loss,
    patch_targets,
    update_masked_center,
    update_patch_center,
)
from dinovmf_plugin.methods.base import DistillationOutput
from dinovmf_plugin.methods.crops import tokens_and_features
from dinovmf_plugin.methods.patch_heads import PatchHeads
from dinovmf_plugin.methods.settings import (
    CenterMomentum,
    DINOSettings,
    PrototypeCount,
    check_maskable,
    check_vit,
)
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Positive, Ratio, Weight, Whole
from dinovmf_plugin.runs.settings import Doc
from dinovmf_plugin.training.records import StepRecord

__all__ = ["IBOT", "IBOTSettings", "IBOTvMF"]

_HEAD_ROWS = 4096  # teacher patches that pass the head at once


@dataclass(frozen=True)
class IBOTSettings(DINOSettings):
    """``method_kwargs`` of ``ibot`` and ``ibot_vmf``: DINO's, and those of the patches.

    ``num_prototypes``, the head and ``student_temperature`` serve CLS and patches alike, unless
    ``patch_head=separate`` gives patches a head of their own, of the same shape;
    ``warmup_teacher_temperature_epochs`` is the length of both warm-ups.
    """

    num_prototypes: PrototypeCount = 8192
    # head of the patches (DINOv2: separate)
    patch_head: Annotated[
        Literal["shared", "separate"],
        Doc("whether patches share head and prototypes with CLS, or have their own (DINOv2)"),
    ] = "shared"
    num_patch_prototypes: Annotated[
        Count | None, Doc("K of patch_head=separate; null: num_prototypes")
    ] = None
    patch_center_tokens: Annotated[
        Literal["all", "masked"],
        Doc("patches that pass the teacher's head and move the center (masked: DINOv2)"),
    ] = "all"
    # teacher of the patches
    teacher_patch_temperature: Annotated[Positive, Doc("of the teacher, on patches")] = 0.07
    warmup_teacher_patch_temperature: Annotated[Positive, Doc("the same at the start")] = 0.04
    patch_center_momentum: CenterMomentum = 0.9
    # loss = lambda1 CLS + lambda2 patches
    lambda1: Annotated[Weight, Doc("weight of the loss on CLS tokens")] = 1.0
    lambda2: Annotated[Weight, Doc("weight of the loss on masked patches")] = 1.0
    # masks (see masking.MaskSampler)
    pred_ratio: Annotated[
        Sequence[Ratio], AtLeastOne, Doc("shares of masked patches, one drawn per crop")
    ] = (0.0, 0.3)
    pred_ratio_var: Annotated[
        Sequence[Ratio], AtLeastOne, Doc("how far each share is varied to both sides")
    ] = (0.0, 0.2)
    pred_shape: Annotated[MaskShape, Doc("of the masks")] = "block"
    pred_start_epoch: Annotated[Whole, Doc("no masks before this epoch")] = 0

    def check(self) -> None:
        """Refuse what DINO refuses; the masks' lists must fit each other."""
        super().check()
        self.mask_sampler()
        if self.num_patch_prototypes is not None and self.patch_head == "shared":
            raise ValueError(
                f"num_patch_prototypes={self.num_patch_prototypes} has no meaning with patch_head=shared, "
                "where patches have the prototypes of CLS: set patch_head=separate"
            )
        for key, value in (("prototype_update", "gradient"), ("init_prototypes", "random")):
            given = getattr(self, key)
            if given != value and self.patch_head == "separate":
                raise ValueError(
                    f"{key}={given} needs patch_head=shared: it clusters the embeddings of one head"
                )
        if self.prototype_update == "em" and self.patch_center_tokens == "masked":
            raise ValueError(
                "prototype_update=em needs patch_center_tokens=all: it learns from all patches"
            )

    def teacher_temperatures(self) -> dict[str, float]:
        """All temperatures of the teacher, by key."""
        return {
            **super().teacher_temperatures(),
            "teacher_patch_temperature": self.teacher_patch_temperature,
            "warmup_teacher_patch_temperature": self.warmup_teacher_patch_temperature,
        }

    def mask_sampler(self) -> MaskSampler:
        """What draws the masks."""
        return MaskSampler(
            tuple(self.pred_ratio),
            tuple(self.pred_ratio_var),
            self.pred_shape,
            self.pred_start_epoch,
        )


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for a GPU."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


class IBOT(PatchHeads):
    """iBOT (arXiv 2111.07832) with both switches of the vMF paper.

    The student sees masked global crops and whole local ones, the teacher whole global ones. CLS tokens
    are DINO (over all pairs of different views, the student's globals masked); masked patches predict the
    teacher's distribution at the same place of the same view. One head, prototypes included, serves
    both, or each has its own (``patch_head=separate``, DINOv2); each has its center and its teacher
    temperature, hence, for vMF, its own concentrations.

    Adds ``mask_token`` (1, 1, D), starting at 0, to the student (decayed, as it is no 1-d tensor), and
    ``patch_centering`` to the state; with a head of their own ``patch_head``, ``momentum_patch_head``.

    Differs from upstream: a head is shared with its prototypes (the published runs' choice), or not at
    all (DINOv2); masks are drawn per batch, from (seed, epoch, batch, rank); only masked patches have
    logits. With ``use_bn_in_head`` (no published run) CLS tokens and patches have statistics of their own.
    """

    settings_class = IBOTSettings

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        s = self.settings
        self.mask_sampler = s.mask_sampler()
        self.patch_centering = make_centering(
            s.centering,
            self.patch_heads[0].last_layer.num_prototypes,
            momentum=s.patch_center_momentum,
            raw_scores=s.center_raw_scores,
            iterations=s.sinkhorn_iterations,
        )

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Check what lies outside ``method_kwargs``."""
        check_vit(cfg)
        super().check_config(cfg)
        check_maskable(cfg)

    def initialize_from_checkpoint(self) -> None:
        """Make the mask token, then start as the others do."""
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.features_dim))
        super().initialize_from_checkpoint()

    def named_parameter_groups(self) -> dict[str, Any]:
        """Group name -> named parameters that the optimizer gets."""
        groups = super().named_parameter_groups()
        return {**groups, "mask_token": [("mask_token", self.mask_token)]}

    def teacher_patch_temperature(self) -> float:
        """The teacher's temperature for patches: its warm-up begins when masking does."""
        s = self.settings
        return schedules.teacher_temperature(
            self.current_epoch - s.pred_start_epoch,
            s.warmup_teacher_patch_temperature,
            s.teacher_patch_temperature,
            s.warmup_teacher_temperature_epochs,
        )

    def draw_masks(self, images: Tensor) -> Tensor:
        """Masks of this batch's global crops ``(N, 3, H, W)``: bool ``(N, P)`` on the CPU, true where masked.

        How many patches are masked must be known to go on: on a GPU that would be waited for.
        """
        grid = backbones.patch_grid(self.backbone, *images.shape[-2:])
        generator = self.step_generator(device=torch.device("cpu"))
        return self.mask_sampler(len(images), *grid, generator, self.current_epoch)

    @torch.no_grad()
    def teacher_tokens(
        self, images: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's CLS features ``(N, D)``, and embeddings of CLS ``(N, p)`` and patches.

        Args:
            images: ``(N, 3, H, W)``.
            chosen: int64 ``(M,)``, the patches among all ``N * P`` that are wanted; None for all.

        Returns:
            Of patches ``(N * P, p)``, or ``(M, p)``.
        """
        (tokens,) = forward_packed(self.momentum_backbone, [Crops(images)])
        features, patches = tokens[:, 0], self.patch_tokens(tokens, images).flatten(0, 1)
        batch_norm, head = self.settings.use_bn_in_head, self.patch_heads[1]
        if chosen is not None and not batch_norm:
            patches = patches.index_select(0, chosen)
        # BatchNorm needs all patches together; otherwise the wide hidden layers are made piece by piece
        size = len(patches) if batch_norm else _HEAD_ROWS
        embeddings = torch.cat([head(chunk) for chunk in patches.split(size)])
        if chosen is not None and batch_norm:
            embeddings = embeddings.index_select(0, chosen)
        return features, self.momentum_head(features), embeddings

    def patch_tokens(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The patches ``(N, P, D)`` among all tokens: without CLS and registers."""
        rows, cols = backbones.patch_grid(self.backbone, *images.shape[-2:])
        return tokens[:, tokens.shape[1] - rows * cols :]

    def student_embeddings(
        self, images: Tensor, masks: Tensor, masked: Tensor, local_crops: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Student's CLS features of the globals ``(N, D)``, CLS embeddings of all crops, of masked patches.

        Masked globals and local crops are one pass over the backbone's weights, and a shared head is one for
        all rows; with BatchNorm it is one for CLS tokens and one for all patches, as in the teacher.

        Args:
            images: global crops ``(N, 3, H, W)``.
            masks: bool ``(N, P)``.
            masked: int64 ``(M,)``, where ``masks`` is true, in row-major order.
            local_crops: tensors ``(B, 3, s, s)``.
        """
        first = Crops(images, masks, self.mask_token)
        tokens, features = tokens_and_features(self.backbone, first, local_crops)
        cls = torch.cat(features)
        patches = self.patch_tokens(tokens, images).flatten(0, 1)
        if self.settings.use_bn_in_head:
            embeddings = self.head(
                cls
            )  # first: its running statistics are moved before the patches'
            return features[0], embeddings, self.patch_heads[0](patches).index_select(0, masked)
        if self.has_patch_head:
            masked_patches = self.patch_head(patches.index_select(0, masked))
            return features[0], self.head(cls), masked_patches
        embeddings = self.head(torch.cat([cls, patches.index_select(0, masked)]))
        return features[0], embeddings[: len(cls)], embeddings[len(cls) :]

    def distillation_loss(self, crops: list[Tensor]) -> DistillationOutput:
        """``lambda1`` times DINO's loss on CLS plus ``lambda2`` times the masked-image loss."""
        s = self.settings
        views = self.num_large_crops
        images = torch.cat(crops[:views])
        drawn = self.draw_masks(images)
        chosen = drawn.flatten().nonzero().squeeze(1)
        masks, chosen = (_sent(x, images.device) for x in (drawn, chosen))

        only_masked = s.patch_center_tokens == "masked"
        teacher_features, teacher_cls, teacher_patches = self.teacher_tokens(
            images, chosen if only_masked else None
        )
        student_patches, prototypes = (head.last_layer for head in self.patch_heads)
        patch_temperature = self.teacher_patch_temperature()
        cls_targets = self.cls_targets(teacher_cls)
        masked_targets = patch_targets(
            self.patch_centering,
            prototypes,
            teacher_patches if only_masked else teacher_patches.index_select(0, chosen),
            patch_temperature,
        )
        update = update_masked_center if only_masked else update_patch_center
        update(self.patch_centering, prototypes, teacher_patches, patch_temperature)
        if not only_masked:  # an image's patches together weigh as much in EM as its CLS token
            self.observe(teacher_patches, len(teacher_cls) / len(teacher_patches))

        features, cls, masked = self.student_embeddings(images, masks, chosen, crops[views:])
        cls = cls.unflatten(0, (len(crops), -1))
        cls_loss = dino_loss(
            cls,
            self.head.last_layer,
            cls_targets.unflatten(0, (views, -1)),
            s.student_temperature,
        )
        patch_loss = ibot_patch_loss(
            masked,
            student_patches,
            masked_targets,
            masks,
            s.student_temperature,
            chosen=chosen,
        )
        temperature = self.teacher_temperature()
        self.last_step = StepRecord(  # of CLS: it is what log K and the alarms speak of
            loss=cls_loss.detach(),
            targets=cls_targets,
            student_embeddings=cls.detach(),
            teacher_embeddings=teacher_cls,
            teacher_temperature=temperature,
            student_temperature=s.student_temperature,
        )
        scalars: dict[str, float | Tensor] = {
            "teacher_temperature": temperature,
            "teacher_patch_temperature": patch_temperature,
            "train_cls_loss": cls_loss.detach(),
            "train_patch_loss": patch_loss.detach(),
            "mask_ratio": masks.float().mean(),
        }
        loss = s.lambda1 * cls_loss + s.lambda2 * patch_loss
        return DistillationOutput(loss, features, teacher_features, scalars)


class IBOTvMF(IBOT):
    """iBOT-vMF: prototypes with vMF normalization, both centers in probability space (Eqs. 6, 7, 9)."""

    default_settings: ClassVar[dict[str, Any]] = {
        "normalization": "vmf",
        "centering": "probability",
    }
