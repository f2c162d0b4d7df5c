"""MSN's loss: cross-entropy of every anchor view with one target, and mean-entropy maximization.

Written from the paper's formulae (Assran et al., "Masked Siamese Networks", arXiv 2204.07141, section 3).
"""

from __future__ import annotations

import math

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.centering import Centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy

__all__ = ["mean_entropy_gap", "msn_loss", "msn_targets"]


def mean_entropy_gap(logits: Tensor) -> Tensor:
    """``log K - H(p_mean)``: what mean-entropy maximization minimizes; 0 if usage is uniform.

    ``p_mean`` is the mean over the rows, and over all ranks (each with as many rows). The reduction
    is differentiable: gradients averaged over ranks, as DDP does, are those of one process with all rows.

    Args:
        logits: anchors' logits ``(rows, K)``.

    Returns:
        Scalar >= 0, float32, the same on every rank.

    Example:
        >>> round(float(mean_entropy_gap(torch.zeros(5, 8)).abs()), 6)
        0.0
        >>> collapsed = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
        >>> round(float(mean_entropy_gap(collapsed)), 4) == round(math.log(2), 4)
        True
    """
    mean = logits.float().softmax(dim=-1).mean(dim=0)
    if distributed.is_distributed():
        mean = dist_nn.all_reduce(mean) / distributed.world_size()
    # a probability that underflows contributes 0, with a finite gradient
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    return math.log(len(mean)) + (mean * log_mean).sum()


def msn_loss(
    anchors: Tensor, prototypes: Prototypes, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all anchor views with their image's target, and the mean-entropy gap.

    Args:
        anchors: unit vectors ``(V, B, p)`` of the anchor views.
        prototypes: the student's prototypes.
        targets: ``(B, K)`` probabilities of the target view.
        temperature: the anchors' ``tau``.

    Returns:
        (cross-entropy, gap): scalars, float32. MSN's loss is their sum.

    Example:
        >>> anchors = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=-1)
        >>> targets = torch.softmax(torch.randn(4, 16), dim=-1)
        >>> [x.shape for x in msn_loss(anchors, Prototypes(8, 16, "l2"), targets, 0.1)]
        [torch.Size([]), torch.Size([])]
    """
    cross_entropy = prototype_cross_entropy(
        anchors,
        prototypes.weight_v,
        targets,
        temperature=temperature,
        magnitude=prototypes.weight_g.squeeze(-1),
        bias=prototypes.log_normalizer(temperature),
    )
    return cross_entropy, mean_entropy_gap(prototypes(anchors.flatten(0, 1), temperature))


@torch.no_grad()
def msn_targets(
    centering: Centering, prototypes: Prototypes, embeddings: Tensor, temperature: float
) -> Tensor:
    """Targets ``(B, K)`` of the target views ``(B, p)``; moves the center, where there is one.

    MSN's sharpening ``p ** (1/T)`` of a softmax at ``tau`` is the softmax at ``temperature = tau T``
    (0.1 * 0.25 = 0.025). For vMF prototypes the log-normalizer is the one at that temperature, as in
    the teacher of DINO-vMF (Eq. 7): each view is a vMF mixture with ``kappa = ||w|| / temperature``.

    Centering starts from the sharpened *probabilities*: with Sinkhorn every sample enters with equal
    mass, as in MSN, whereas SwAV and DINOv2 (and ``dino_multicrop`` here) start from the exponentials of
    the scores. For the other centerings this changes nothing.
    """
    log_p = prototypes(embeddings, temperature).log_softmax(dim=-1)
    targets = centering(log_p, 1.0)
    centering.update(log_p, 1.0)
    return targets
