"""The teacher's targets from its embeddings, and the center's step, in as few passes as the device allows."""

from __future__ import annotations

import torch
from torch import Tensor

from dinovmf_plugin.core.centering import Centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.triton_use import triton_serves

__all__ = ["teacher_targets"]


@torch.no_grad()
def teacher_targets(
    centering: Centering,
    prototypes: Prototypes,
    embeddings: Tensor,
    temperature: float,
    log_normalizer: Tensor | None,
    *,
    update: bool = True,
) -> Tensor:
    """Targets of the teacher's embeddings; then moves the center (paper Eqs. 7 to 9).

    On CUDA devices two kernels make the targets and the center's statistic from the products
    (``target_kernels``); ``DINOVMF_TRITON=0`` and every other device take the plain formulas of
    ``Prototypes.scores`` and ``Centering``, which have the same values.

    Args:
        centering: whose center is used as it is, and moved afterwards.
        prototypes: the teacher's.
        embeddings: unit vectors ``(rows, p)``.
        temperature: the teacher's.
        log_normalizer: ``prototypes.log_normalizer(temperature)``, made once where rows come in chunks.
        update: False leaves the center where it is.

    Returns:
        float32 probabilities ``(rows, K)``.

    Example:
        >>> from dinovmf_plugin.core.centering import make_centering
        >>> teacher = Prototypes(8, 16, "vmf")
        >>> y = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
        >>> bias = teacher.log_normalizer(0.04)
        >>> targets = teacher_targets(make_centering("probability", 16), teacher, y, 0.04, bias)
        >>> targets.shape
        torch.Size([4, 16])
    """
    if len(embeddings) and triton_serves(embeddings):
        logits = centering.affine_logits(temperature, log_normalizer)
        if logits is not None:
            from dinovmf_plugin.core.target_kernels import fused_targets

            targets, found = fused_targets(
                prototypes.products(embeddings),
                prototypes.scale(),
                *logits,
                temperature,
                centering.statistic if update else None,
            )
            if found is not None:
                centering.update_from(found, len(embeddings), temperature, log_normalizer)
            return targets
    scores = prototypes.scores(embeddings)
    targets = centering(scores, temperature, log_normalizer)
    if update:
        centering.update(scores, temperature, log_normalizer)
    return targets
