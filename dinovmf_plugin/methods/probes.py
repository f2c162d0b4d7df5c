"""What watches the features while a method trains: a linear classifier and kNN, on both hosts."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.heads import ProjectionHead
from dinovmf_plugin.host import BaseMomentumMethod, accuracy_at_k, weighted_mean

__all__ = ["OnlineProbes"]


class OnlineProbes(BaseMomentumMethod):
    """Features of student and teacher, the host's online classifier and kNN on them, validation.

    Differs from upstream (solo-learn's base): images of any size; labels are optional; kNN looks at the
    teacher.
    """

    head: ProjectionHead
    momentum_head: ProjectionHead

    def student_features(self, images: Tensor) -> Tensor:
        """Pooled (CLS) features of the student, ``(N, D)``."""
        return self.pooled(self.backbone, images)

    @staticmethod
    def pooled(backbone: nn.Module, images: Tensor) -> Tensor:
        """Features of any size of crop: CLS after the final norm for ViTs, the pooled map otherwise."""
        if backbones.is_vit(backbone):
            return backbones.forward_tokens(backbone, images)[:, 0]
        return backbone(images)

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Student: ``logits`` of the online classifier, ``feats``, and the unit vectors ``z``."""
        feats = self.student_features(X)
        return {"logits": self.classifier(feats.detach()), "feats": feats, "z": self.head(feats)}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Teacher: ``feats`` and the unit vectors ``z``."""
        feats = self.pooled(self.momentum_backbone, X)
        return {"feats": feats, "z": self.momentum_head(feats)}

    def online_classifier_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of a linear probe on detached features; logs its accuracy.

        Mean over the images whose label is known (not -1). Zero, but attached to the classifier (DDP
        wants every parameter used), where none is.
        """
        logits = self.classifier(features.detach())
        if OmegaConf.select(self.cfg, "data.no_labels", default=False):
            return 0.0 * logits.sum()
        targets = targets.repeat(len(features) // len(targets)).clamp(min=-1)
        known = (targets >= 0).sum().clamp(min=1)
        total = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
        loss = total / known
        # no boolean indexing: a GPU would be waited for to know how many are left
        best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best == targets[:, None]).any(dim=1), best[:, 0] == targets
        acc5, acc1 = (100 * hit.sum() / known for hit in hits)
        metrics = {"train_class_loss": loss.detach(), "train_acc1": acc1, "train_acc5": acc5}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        return loss

    def update_knn_bank(self, features: Tensor, targets: Tensor) -> None:
        """Add teacher features of the global views to the online kNN, which leaves out unknown labels."""
        if self.knn_eval:
            targets = targets.repeat(len(features) // len(targets))
            self.knn.update(train_features=features, train_targets=targets)

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Online classifier of the student and, if enabled, kNN of the teacher."""
        images, targets = batch
        logits = self.classifier(self.student_features(images))
        acc1, acc5 = accuracy_at_k(logits, targets, top_k=(1, min(5, logits.shape[1])))
        if self.knn_eval and not self.trainer.sanity_checking:
            features = self.pooled(self.momentum_backbone, images)
            self.knn.update(test_features=features, test_targets=targets)
        self.validation_step_outputs.append(
            {
                "batch_size": len(targets),
                "val_loss": F.cross_entropy(logits.float(), targets, ignore_index=-1),
                "val_acc1": acc1,
                "val_acc5": acc5,
            }
        )

    def on_validation_epoch_end(self) -> None:
        """Average over the batches, the last one perhaps smaller."""
        outputs = self.validation_step_outputs
        keys = ("val_loss", "val_acc1", "val_acc5")
        metrics = {key: weighted_mean(outputs, key, "batch_size") for key in keys}
        if self.knn_eval and not self.trainer.sanity_checking:
            metrics["val_knn_acc1"], metrics["val_knn_acc5"] = self.knn.compute()
        self.log_dict(metrics, sync_dist=True)
        outputs.clear()
