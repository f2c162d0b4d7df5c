"""What a training step leaves behind: a record for the monitors, or an error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["REMEDY", "NonFiniteLossError", "StepRecord"]

REMEDY = (
    "the last checkpoint is untouched. Lower optimizer.lr, train with precision=bf16-mixed instead of "
    "16-mixed, or set method_kwargs.clip_grad (DINO ViT-B: 0.3)"
)


class NonFiniteLossError(RuntimeError):
    """The loss (or a weight) became NaN or infinite: training stops before a checkpoint is lost."""


@dataclass(frozen=True)
class StepRecord:
    """Detached tensors of the last training step; see ``training.monitor.MixtureMonitor``.

    Attributes:
        loss: self-distillation loss without the online classifier, scalar.
        targets: teacher probabilities of the global views ``(rows, K)``.
        student_embeddings: unit vectors of all student views ``(V, N, p)``.
        teacher_embeddings: unit vectors of the global views ``(rows, p)``.
        teacher_temperature: the teacher's temperature in this step.
        student_temperature: the student's temperature.
    """

    loss: Tensor
    targets: Tensor
    student_embeddings: Tensor
    teacher_embeddings: Tensor
    teacher_temperature: float
    student_temperature: float
