"""The candidates of ``benchmark.py loss``: one step of head's last layer and loss, on the same tensors.

    none, vmf   this project: ``Prototypes``, ``LogitCentering``, ``prototype_cross_entropy``
    eager       none without Triton's kernels (``DINOVMF_TRITON=0``): what they give, on a GPU
    lightly     ``DINOProjectionHead.last_layer`` and ``DINOLoss`` (optional: pip install lightly)
    per_pair    the published formula: all logits, then one cross-entropy per pair of views
    products    only the matrix products that nobody can do without: teacher and student logits and the
                two gradients of the student's, in the faster memory layout (prototypes first)

All but ``products`` include the teacher's softmax targets and the center's update. Under bf16 on a CPU
that only emulates it, ``products`` are float32 products: the fastest that this machine can do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinovmf_plugin.core.centering import LogitCentering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.targets import teacher_targets
from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy
from dinovmf_plugin.losses.dino import view_pairs
from dinovmf_plugin.losses.plan import multiplies_natively

__all__ = ["Workload"]

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, MOMENTUM = 0.1, 0.04, 0.9

Forward = Callable[[], Tensor]


class Workload:
    """The same student and teacher tensors for every candidate.

    Args:
        batch: images.
        prototypes: ``K``.
        dim: ``p``.
        crops: local crops.
        half: products in bf16 (by autocast).
        device: of all tensors: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, batch: int, prototypes: int, dim: int, crops: int, half: bool, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.views, self.batch, self.prototypes, self.dim = 2 + crops, batch, prototypes, dim
        self.half, self.device = half, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.weights = [normal(prototypes, dim) / dim**0.5 for _ in ("student", "teacher")]
        self.student_rows = F.normalize(normal(self.views * batch, dim), dim=-1)
        self.teacher_rows = F.normalize(normal(2 * batch, dim), dim=-1)

    def candidate(self, name: str) -> Callable[[], dict[str, Tensor]]:
        """A step, forward and backward, that returns loss and gradients by name.

        Raises:
            ValueError: for an unknown name.
            ModuleNotFoundError: for lightly where it is not installed.
        """
        if name == "products":
            return self._products()
        y = self.student_rows.clone().requires_grad_()
        if name in ("none", "vmf", "eager"):
            forward, layer = self._project(y, "none" if name == "eager" else name)
        elif name == "lightly":
            forward, layer = self._lightly(y)
        elif name == "per_pair":
            forward, layer = self._per_pair(y)
        else:
            raise ValueError(f"there is no candidate {name!r}")
        leaves: dict[str, Tensor] = {"embeddings": y, **dict(layer.named_parameters())}

        def step() -> dict[str, Tensor]:
            kernels = "0" if name == "eager" else os.environ.get("DINOVMF_TRITON", "1")
            with (
                mock.patch.dict(os.environ, {"DINOVMF_TRITON": kernels}),
                torch.autocast(self.device, torch.bfloat16, enabled=self.half),
            ):
                loss = forward()
            loss.backward()
            out = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
            for leaf in leaves.values():
                leaf.grad = None
            return {"loss": loss.detach(), **out}

        return step

    def _project(self, y: Tensor, normalization: Any) -> tuple[Forward, nn.Module]:
        student, teacher = (
            Prototypes(self.dim, self.prototypes, normalization).to(self.device)
            for _ in self.weights
        )
        for layer, weight in zip((student, teacher), self.weights, strict=True):
            layer.weight_v.data.copy_(weight)
        centering = LogitCentering(self.prototypes, MOMENTUM).to(self.device)

        @torch.no_grad()
        def targets() -> Tensor:
            how = TEACHER_TEMPERATURE, teacher.log_normalizer(TEACHER_TEMPERATURE)
            found = teacher_targets(centering, teacher, self.teacher_rows, *how)
            return found.unflatten(0, (2, -1))

        def forward() -> Tensor:
            return prototype_cross_entropy(
                y.unflatten(0, (self.views, -1)),
                student.weight_v,
                targets(),
                temperature=STUDENT_TEMPERATURE,
                magnitude=student.weight_g.squeeze(-1),
                bias=student.log_normalizer(STUDENT_TEMPERATURE),
                pair_weights=view_pairs(2, self.views) / self.batch,
            )

        return forward, student

    def _load(self, make: Callable[[], nn.Module]) -> list[Any]:
        layers = []
        for weight in self.weights:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                layer: Any = make().to(self.device)
            layer.weight_v.data.copy_(weight)
            layer.weight_g.data.fill_(1)
            layers.append(layer)
        return layers

    def _lightly(self, y: Tensor) -> tuple[Forward, nn.Module]:
        from lightly.loss import DINOLoss
        from lightly.models.modules.heads import DINOProjectionHead

        def make() -> nn.Module:
            head = DINOProjectionHead(1, 1, self.dim, self.prototypes, norm_last_layer=False)
            return head.last_layer

        student, teacher = self._load(make)
        loss = DINOLoss(
            self.prototypes,
            teacher_temp=TEACHER_TEMPERATURE,
            student_temp=STUDENT_TEMPERATURE,
            center_momentum=MOMENTUM,
        ).to(self.device)

        def forward() -> Tensor:
            with torch.no_grad():
                teacher_out = teacher(self.teacher_rows).chunk(2)
            return loss(list(teacher_out), list(student(y).chunk(self.views)))

        return forward, student

    def _per_pair(self, y: Tensor) -> tuple[Forward, nn.Module]:
        def make() -> nn.Module:
            return nn.utils.weight_norm(nn.Linear(self.dim, self.prototypes, bias=False))

        student, teacher = self._load(make)
        center = torch.zeros(1, self.prototypes, device=self.device)

        def forward() -> Tensor:
            with torch.no_grad():
                scores = teacher(self.teacher_rows)
                targets = F.softmax((scores - center) / TEACHER_TEMPERATURE, dim=-1).chunk(2)
            logits = (student(y) / STUDENT_TEMPERATURE).chunk(self.views)
            pairs = [
                torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean()
                for q, target in enumerate(targets)
                for v, view in enumerate(logits)
                if v != q
            ]
            with torch.no_grad():
                center.lerp_(scores.float().mean(dim=0, keepdim=True), 1 - MOMENTUM)
            return torch.stack(pairs).mean()

        return forward, student

    def _products(self) -> Callable[[], dict[str, Tensor]]:
        half = self.half and multiplies_natively(torch.bfloat16, self.device)
        dtype = torch.bfloat16 if half else torch.float32
        w, teacher, y, t = (
            x.to(dtype) for x in (*self.weights, self.student_rows, self.teacher_rows)
        )

        def step() -> dict[str, Tensor]:
            torch.mm(teacher, t.t())
            logits = torch.mm(w, y.t())
            torch.mm(logits, y)
            torch.mm(logits.t(), w)
            return {}

        return step
