"""iBOT's masked-image loss: only masked patches have logits, and no tensor holds all patches times K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.centering import Centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.targets import teacher_targets
from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy

__all__ = [
    "ibot_patch_loss",
    "masked_token_weights",
    "patch_targets",
    "update_masked_center",
    "update_patch_center",
]

# Least scores of one chunk of patches. 2**23 float32 are 32 MiB: from this size on, glibc gives every block
# back; with smaller ones its heap fragments, and sometimes grows by all the scores together.
_CHUNK_NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 26}


def masked_token_weights(masks: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Weight of every masked token: 1 / (masked tokens of its image * number of images).

    The sum over tokens of weight times loss is the mean, over *all* images, of each image's mean over
    its masked tokens; an image without any adds 0 (iBOT).

    Args:
        masks: bool ``(N, P)``.
        chosen: ``masks.flatten().nonzero()`` as ``(M,)``, if it is known already: to find it is to wait
            for a GPU.

    Returns:
        float32 ``(M,)`` for the ``M`` true entries, in row-major order.

    Example:
        >>> masks = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
        >>> [round(float(w), 4) for w in masked_token_weights(masks)]
        [0.1667, 0.1667, 0.3333]
    """
    share = 1 / (masks.sum(dim=1, keepdim=True).clamp(min=1) * len(masks))
    if chosen is None:
        return share.expand(masks.shape)[masks]
    return share.squeeze(1).index_select(0, chosen // masks.shape[1])


def ibot_patch_loss(
    student: Tensor,
    prototypes: Prototypes,
    targets: Tensor,
    masks: Tensor,
    temperature: float,
    *,
    chosen: Tensor | None = None,
) -> Tensor:
    """Masked-image loss (paper A.5): cross-entropy between teacher and student at masked patches.

    With ``M`` masked patches in ``N`` images (all views together), the mean over images of each
    image's mean over its masked patches. Without a masked patch the loss is 0, still attached to the
    student and its prototypes, so that every rank has the same graph.

    Args:
        student: unit vectors ``(M, p)`` of the masked patches, in row-major order of ``masks``.
        prototypes: the student's prototypes for patches, which may be those of the CLS token.
        targets: teacher probabilities ``(M, K)`` of the same patches.
        masks: bool ``(N, P)``.
        temperature: the student's ``tau``.
        chosen: see ``masked_token_weights``.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: if the numbers of masked patches differ.

    Example:
        >>> masks = torch.tensor([[True, False], [False, False]])
        >>> student = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
        >>> ibot_patch_loss(student, Prototypes(8, 4), torch.full((1, 4), 0.25), masks, 0.1).shape
        torch.Size([])
    """
    if len(student) != len(targets):
        raise ValueError(
            f"{len(student)} student and {len(targets)} teacher patches: both must be the masked ones"
        )
    return prototype_cross_entropy(
        student,
        prototypes.weight_v,
        targets,
        temperature=temperature,
        magnitude=prototypes.weight_g.squeeze(-1),
        bias=prototypes.log_normalizer(temperature),
        pair_weights=student.new_ones(1, 1, dtype=torch.float32),
        row_weights=masked_token_weights(masks, chosen),
    )


def _chunks(prototypes: Prototypes, embeddings: Tensor) -> Sequence[Tensor]:
    numbers = _CHUNK_NUMBERS.get(embeddings.device.type, _CHUNK_NUMBERS["cuda"])
    pieces = max(len(embeddings) * prototypes.num_prototypes // numbers, 1)
    return embeddings.tensor_split(pieces)


@torch.no_grad()
def patch_targets(
    centering: Centering, prototypes: Prototypes, embeddings: Tensor, temperature: float
) -> Tensor:
    """Targets ``(M, K)`` of the teacher's masked patches ``(M, p)``.

    With ``centering=sinkhorn`` the masked patches of all ranks are one assignment (DINOv2). Otherwise
    scores and targets are made in chunks of patches: only the targets exist for all of them.
    """
    how = temperature, prototypes.log_normalizer(temperature)
    if not centering.row_wise:
        return teacher_targets(centering, prototypes, embeddings, *how, update=False)
    shape = len(embeddings), prototypes.num_prototypes
    targets = torch.empty(shape, dtype=torch.float32, device=embeddings.device)
    row = 0
    for chunk in _chunks(prototypes, embeddings):
        made = teacher_targets(centering, prototypes, chunk, *how, update=False)
        targets[row : row + len(chunk)] = made
        row += len(chunk)
    return targets


@torch.no_grad()
def update_patch_center(
    centering: Centering, prototypes: Prototypes, embeddings: Tensor, temperature: float
) -> None:
    """Move the patches' center, which sees *all* patches, masked or not.

    In logit space the center of the batch is the score of the mean embedding, one row. In probability
    space the softmax stands between: the scores are made and reduced in chunks of patches.

    Args:
        centering: the patches' own centering.
        prototypes: the teacher's.
        embeddings: unit vectors of all patches of the global views ``(rows, p)``.
        temperature: the teacher's temperature for patches.

    Differs from upstream: iBOT forms the logits of all patches; the value is the same.
    """
    if centering.linear:
        scores = iter([prototypes.scores(distributed.mean_over_rows(embeddings.float()))])
    else:
        scores = map(prototypes.scores, _chunks(prototypes, embeddings))
    centering.update(scores, temperature, prototypes.log_normalizer(temperature))


@torch.no_grad()
def update_masked_center(
    centering: Centering, prototypes: Prototypes, embeddings: Tensor, temperature: float
) -> None:
    """Move the patches' center by the masked patches alone (DINOv2); without any on any rank it stays.

    Args:
        centering: the patches' own centering.
        prototypes: the teacher's.
        embeddings: unit vectors of this rank's masked patches ``(M, p)``; M may be 0.
        temperature: the teacher's temperature for patches.

    Differs from upstream: DINOv2 averages the means of the ranks, this the rows of all ranks.
    """
    some = distributed.any_rank(len(embeddings) > 0)
    if some is False:
        return
    before = centering.center.clone()
    update_patch_center(centering, prototypes, embeddings, temperature)
    if isinstance(some, Tensor):
        centering.center.copy_(torch.where(some, centering.center, before))
