"""What passes patches in student and teacher: the heads of CLS, or heads of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from dinovmf_plugin.core.heads import DINOHead, ProjectionHead
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.methods.dino import DINOMultiCrop

__all__ = ["PatchHeads"]


class PatchHeads(DINOMultiCrop):
    """DINO with what ``patch_head=separate`` adds: ``patch_head`` and its teacher ``momentum_patch_head``.

    Own MLP, own prototypes, hence own concentrations. Trained, clipped, frozen in the first epochs,
    averaged, stored and imported as the head of CLS is.
    """

    has_patch_head: bool

    def make_heads(self) -> None:
        """The heads of student and teacher, those of the patches included."""
        super().make_heads()
        s = self.settings
        self.has_patch_head = s.patch_head == "separate"
        if self.has_patch_head:
            count = s.num_patch_prototypes or s.num_prototypes
            self.patch_head = self.make_head(count)
            self.momentum_patch_head = self.make_head(count)

    def initialize_teacher(self) -> None:
        """Copy the student's heads into the teacher's, which then have no gradient."""
        super().initialize_teacher()
        if self.has_patch_head:
            self.momentum_patch_head.load_state_dict(self.patch_head.state_dict())
            self.momentum_patch_head.requires_grad_(False)

    @property
    def patch_heads(self) -> tuple[DINOHead, DINOHead]:
        """What patches pass in student and teacher: heads of their own, or those of CLS."""
        if self.has_patch_head:
            return self.patch_head, self.momentum_patch_head
        return self.head, self.momentum_head

    @property
    def projection_heads(self) -> list[ProjectionHead]:
        """Every head of student and teacher."""
        return [*super().projection_heads, *(self.patch_heads if self.has_patch_head else ())]

    @property
    def spread_prototypes(self) -> list[Prototypes]:
        """All prototypes of the student, each set to be spread on its own."""
        own = [self.patch_head.last_layer] if self.has_patch_head else []
        return [*super().spread_prototypes, *own]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student, teacher) modules that the EMA follows."""
        return [*super().momentum_pairs, *([self.patch_heads] if self.has_patch_head else [])]

    def projection(self) -> nn.Module:
        """The student's heads as checkpoints name their parts: that of the patches below ``patch``."""
        if not self.has_patch_head:
            return self.head
        head = self.head
        parts = {"mlp": head.mlp, "last_layer": head.last_layer, "patch": self.patch_head}
        return nn.ModuleDict(parts)

    def named_parameter_groups(self) -> dict[str, Any]:
        """Group name -> named parameters that the optimizer gets."""
        groups = super().named_parameter_groups()
        if self.has_patch_head:
            groups["patch_head"] = self.patch_head.named_parameters()
        return groups
