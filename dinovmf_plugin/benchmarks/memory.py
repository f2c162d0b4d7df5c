"""Peak memory of iBOT's loss beside an implementation that stores the logits of all patches.

Each candidate runs, forward and backward, in a fresh process on the same tensors: bottleneck vectors of all
views, as the projection heads return them. The CLS loss, the patch loss, the teacher's targets and both
centers are included; backbones and heads are not.

    ibot      this project, free prototypes, centering of the logits
    ibot_vmf  this project, vMF prototypes, centering of the probabilities
    plain     iBOT's formula as it is written: student and teacher logits of every patch of both views
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.benchmarks.harness import (
    announce,
    in_own_process,
    machine,
    peak_growth,
    read_settings,
    write_report,
)
from dinovmf_plugin.benchmarks.settings import MemorySettings
from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.masking import MaskSampler
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses.dino import dino_loss
from dinovmf_plugin.losses.ibot import ibot_patch_loss, patch_targets, update_patch_center

__all__ = ["Workload", "main", "measure"]

_STUDENT, _CLS, _PATCH = 0.1, 0.04, 0.04
_GLOBALS = 2


class Workload:
    """The same bottleneck vectors, masks and prototypes for every candidate.

    Args:
        settings: of the topic.
        normalization: of the prototypes.
    """

    def __init__(self, settings: MemorySettings, normalization: Any = "none") -> None:
        generator = torch.Generator().manual_seed(0)
        batch, grid, dim = settings.batch, settings.grid, settings.dim
        images = _GLOBALS * batch

        def units(*shape: int) -> Tensor:
            return F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)

        self.batch = batch
        self.masks = MaskSampler([0.0, 0.3], [0.0, 0.2])(images, grid, grid, generator)
        self.student_cls = units((_GLOBALS + settings.crops) * batch)
        self.teacher_cls = units(images)
        self.student_patches = units(images, grid * grid)
        self.teacher_patches = units(images, grid * grid)
        torch.manual_seed(0)
        self.student, self.teacher = (
            Prototypes(dim, settings.prototypes, normalization) for _ in range(2)
        )

    def project(self, centering: Any) -> dict[str, Tensor]:
        """One step of this project: loss and gradients."""
        k = self.student.num_prototypes
        cls_center, patch_center = (make_centering(centering, k) for _ in range(2))
        cls = self.student_cls.clone().requires_grad_()
        masked = self.student_patches[self.masks].requires_grad_()
        with torch.no_grad():
            scores, bias = self.teacher.scores(self.teacher_cls), self.teacher.log_normalizer(_CLS)
            cls_targets = cls_center(scores, _CLS, bias).unflatten(0, (_GLOBALS, -1))
            cls_center.update(scores, _CLS, bias)
        targets = patch_targets(
            patch_center, self.teacher, self.teacher_patches[self.masks], _PATCH
        )
        update_patch_center(patch_center, self.teacher, self.teacher_patches.flatten(0, 1), _PATCH)
        views = cls.unflatten(0, (-1, self.batch))
        loss = dino_loss(views, self.student, cls_targets, _STUDENT)
        loss = loss + ibot_patch_loss(masked, self.student, targets, self.masks, _STUDENT)
        loss.backward()
        return self._result(loss, cls, masked.grad, patch_center.center)

    def plain(self) -> dict[str, Tensor]:
        """One step of the published formula with all logits."""
        cls = self.student_cls.clone().requires_grad_()
        patches = self.student_patches.clone().requires_grad_()
        w_s, w_t = self.student.weight(), self.teacher.weight().detach()
        center, patch_center = torch.zeros(1, len(w_t)), torch.zeros(1, 1, len(w_t))
        with torch.no_grad():
            teacher_cls, teacher_patches = self.teacher_cls @ w_t.T, self.teacher_patches @ w_t.T
            cls_targets = ((teacher_cls - center) / _CLS).softmax(-1).chunk(_GLOBALS)
            targets = ((teacher_patches - patch_center) / _PATCH).softmax(-1).chunk(_GLOBALS)
        views = (cls @ w_s.T / _STUDENT).chunk(len(cls) // self.batch)
        patch_views = (patches @ w_s.T / _STUDENT).chunk(_GLOBALS)
        masks = self.masks.chunk(_GLOBALS)
        cls_terms, patch_terms = [], []
        for q in range(_GLOBALS):
            for v, view in enumerate(views):
                if v == q:
                    ce = -(targets[q] * patch_views[v].log_softmax(-1)).sum(-1)
                    count = masks[v].sum(-1).clamp(min=1)
                    patch_terms.append(((ce * masks[v]).sum(-1) / count).mean())
                else:
                    cls_terms.append(-(cls_targets[q] * view.log_softmax(-1)).sum(-1).mean())
        loss = torch.stack(cls_terms).mean() + torch.stack(patch_terms).mean()
        loss.backward()
        patch_center = 0.9 * patch_center + 0.1 * teacher_patches.mean(dim=(0, 1), keepdim=True)
        assert patches.grad is not None
        return self._result(loss, cls, patches.grad[self.masks], patch_center.flatten(0, 1))

    def _result(
        self, loss: Tensor, cls: Tensor, patches: Tensor | None, center: Tensor
    ) -> dict[str, Tensor]:
        out = {"loss": loss.detach(), "center": center, "cls": cls.grad, "patches": patches}
        for name, parameter in self.student.named_parameters():
            out[name], parameter.grad = parameter.grad, None
        return {name: value for name, value in out.items() if value is not None}

    def run(self, name: str) -> dict[str, Tensor]:
        """One step of a candidate: loss, patch center and gradients."""
        if name == "plain":
            return self.plain()
        return self.project("probability" if name == "ibot_vmf" else "logit")


def measure(name: str, settings: MemorySettings) -> dict[str, float]:
    """CPU seconds of a step and the memory, in MB (1e6 bytes), by which this process grows in it.

    A small step first brings in the libraries; then the kernel's peak counter is reset.
    """
    normalization = "vmf" if name == "ibot_vmf" else "none"
    Workload(replace(settings, batch=2, prototypes=64), normalization).run(name)
    load = Workload(settings, normalization)
    found: list[Any] = []

    def step() -> None:
        start = time.process_time()
        found.append(float(load.run(name)["loss"]))
        found.append(time.process_time() - start)

    peak = peak_growth(step)
    return {"loss": found[0], "cpu_seconds": found[1], "peak_mb": peak / 1e6}


def _difference(settings: MemorySettings) -> dict[str, float]:
    """Largest difference between ``ibot`` and ``plain``, relative to the largest entry (8 images)."""
    load = Workload(replace(settings, batch=min(settings.batch, 8)))
    ours, plain = load.run("ibot"), load.run("plain")
    return {
        key: float((ours[key] - plain[key]).abs().max() / plain[key].abs().max()) for key in ours
    }


def main(argv: list[str]) -> None:
    """Print peak memory and times; write them as JSON if ``output=`` is given.

    Args:
        argv: ``key=value`` arguments, keys of ``MemorySettings``.

    Raises:
        ValueError: for an unknown key or value.
        FileExistsError: if the output exists already.
    """
    settings = read_settings(MemorySettings, argv)
    about = machine()
    announce(about)
    masks = Workload(replace(settings, dim=4, prototypes=4)).masks
    masked = {"patches": masks.numel(), "masked": int(masks.sum())}
    print(
        f"batch {settings.batch}, 2 global and {settings.crops} local crops, K "
        f"{settings.prototypes}, {masked['masked']} of {masked['patches']} patches masked"
    )
    results: dict[str, dict[str, float]] = {}
    module = "dinovmf_plugin.benchmarks.memory"
    for candidate in settings.candidates:
        results[candidate] = in_own_process(module, "measure", candidate, settings)
    largest = results.get("plain", {}).get("peak_mb")
    for name, row in results.items():
        share = f", {row['peak_mb'] / largest:.3f} of plain" if largest else ""
        print(f"  {name:9s} peak {row['peak_mb']:7.0f} MB{share}; {row['cpu_seconds']:.1f} CPU s")
    difference = _difference(settings)
    worst = max(difference, key=lambda key: difference[key])
    print(f"  largest relative difference of ibot from plain: {difference[worst]:.1e} ({worst})")
    found = {**masked, "results": results, "difference": difference}
    write_report("memory", argv, settings, about, found)
