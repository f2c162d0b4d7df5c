"""What to watch while a mixture trains: pure functions, tensors in, scalar tensors out.

Everything stays on the device; ``training.monitor`` moves one small vector to the CPU per record.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.mixture.utilization import duplicate_groups

__all__ = [
    "distillation_statistics",
    "drift_statistics",
    "duplicate_statistics",
    "entropy",
    "information_statistics",
    "information_sums",
    "prototype_statistics",
    "usage_statistics",
    "winners",
]

DUPLICATE_THRESHOLD = 0.9


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each distribution in nats, ``(..., K) -> (...)``; exact zeros count as zero.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [0.6931471824645996, 0.0]
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    # torch.special.entr is not vectorized on CPUs
    return probabilities.clamp_min(tiny).log_().neg_().mul_(probabilities).sum(dim=-1)


def distillation_statistics(targets: Tensor, student_logits: Tensor) -> dict[str, Tensor]:
    """How teacher and student see the same images.

    Args:
        targets: teacher probabilities ``(n, K)``.
        student_logits: student logits ``(n, K)`` of the same images.

    Returns:
        Scalars: ``teacher_entropy`` and ``student_entropy`` (means, nats; log K is uniform, 0 is
        one-hot), ``kl`` = KL(teacher || student), and ``top1_agreement`` in [0, 1].

    Example:
        >>> p = torch.tensor([[0.75, 0.25]])
        >>> found = distillation_statistics(p, p.log())
        >>> round(float(found["kl"]), 6), float(found["top1_agreement"])
        (0.0, 1.0)
    """
    targets = targets.float()
    log_student = student_logits.float().log_softmax(dim=-1)
    teacher_entropy = entropy(targets)
    cross_entropy = -(targets * log_student).sum(dim=-1)
    agreement = targets.argmax(dim=-1) == student_logits.argmax(dim=-1)
    return {
        "teacher_entropy": teacher_entropy.mean(),
        "student_entropy": -(log_student.exp() * log_student).sum(dim=-1).mean(),
        "kl": (cross_entropy - teacher_entropy).mean(),
        "top1_agreement": agreement.float().mean(),
    }


def winners(targets: Tensor, block: int = 256) -> Tensor:
    """``targets.argmax(dim=-1)`` in a quarter of the time on a CPU: of the blocks' maxima, then in one.

    Args:
        targets: ``(n, K)``.
        block: prototypes to a block; K that is no multiple of it takes the plain way.

    Returns:
        ``(n,)`` int64; of equal values the first.

    Example:
        >>> winners(torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.4, 0.4, 0.1, 0.1]]), block=2).tolist()
        [2, 0]
    """
    if targets.shape[-1] % block or not len(targets):
        return targets.argmax(dim=-1)
    blocks = targets.unflatten(-1, (-1, block))
    chosen = blocks.amax(dim=-1).argmax(dim=-1)
    rows = torch.arange(len(targets), device=targets.device)
    return chosen * block + blocks[rows, chosen].argmax(dim=-1)


def information_sums(targets: Tensor, loss: Tensor) -> Tensor:
    """What ``information_statistics`` needs of some rows; adds up over steps and over ranks.

    Args:
        targets: teacher probabilities ``(n, K)``.
        loss: mean cross-entropy of the student with such targets, scalar.

    Returns:
        ``(K + 3,)`` float32: the sum of the targets, of their entropies, of the loss, and n.

    Example:
        >>> information_sums(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor(0.5)).tolist()
        [1.0, 1.0, 0.0, 1.0, 2.0]
    """
    targets, rows = targets.float(), len(targets)
    parts = [entropy(targets).sum(), loss.float() * rows, loss.new_tensor(rows, dtype=torch.float)]
    return torch.cat([targets.sum(dim=0), torch.stack(parts)])


def information_statistics(sums: Tensor) -> dict[str, Tensor]:
    """How much the targets say about the image, and how much of it the student says, too.

    The mutual information of image and component is ``I = H(mean target) - mean H(target)``: 0 if all
    images have the same target, be it uniform or one-hot, and at most log K (and log n). The student's
    share is ``I - mean KL(target || student) = H(mean target) - mean cross-entropy``.

    Args:
        sums: of ``information_sums`` ``(K + 3,)``, added up over the rows to look at.

    Returns:
        Scalars: ``target_information`` and ``student_information`` in nats, both as a share of log K
        (``..._share``; NaN for K = 1), and ``information_rows`` = n.

    Example:
        >>> sums = information_sums(torch.eye(4), torch.tensor(0.0))
        >>> found = information_statistics(sums)  # four images, four components, a perfect student
        >>> float(found["target_information_share"]), float(found["student_information_share"])
        (1.0, 1.0)
    """
    rows = sums[-1]
    mean, (entropies, loss) = sums[:-3] / rows, sums[-3:-1] / rows
    of_mean = entropy(mean)
    found = {"target_information": of_mean - entropies, "student_information": of_mean - loss}
    log_k = math.log(len(mean)) or math.nan
    shares = {f"{name}_share": value / log_k for name, value in found.items()}
    return {**found, **shares, "information_rows": rows}


def usage_statistics(counts: Tensor) -> dict[str, Tensor]:
    """How evenly the prototypes win.

    Args:
        counts: targets per arg-max prototype ``(K,)``.

    Returns:
        Scalars: ``win_share`` (share of prototypes that won at least once), ``usage_perplexity``
        (``exp`` of the entropy of the wins: the number of equally used prototypes), and
        ``largest_win_share`` (share of the wins that the most frequent prototype has).

    Example:
        >>> found = usage_statistics(torch.tensor([4, 4, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'win_share': 0.5, 'usage_perplexity': 2.0, 'largest_win_share': 0.5}
    """
    share = counts.double() / counts.sum().clamp_min(1)
    return {
        "win_share": (counts > 0).double().mean(),
        "usage_perplexity": entropy(share).exp(),
        "largest_win_share": share.max(),
    }


@torch.no_grad()
def prototype_statistics(prototypes: Prototypes, temperature: float) -> dict[str, Tensor]:
    """Magnitudes and concentrations of the components.

    Args:
        prototypes: the layer.
        temperature: its temperature; ``kappa = |g| / tau``.

    Returns:
        Scalars: ``kappa_min, kappa_p05, kappa_median, kappa_p95, kappa_max``, the same five of the
        magnitudes as ``magnitude_*``, ``negative_g`` (number of magnitudes below zero: legal, the
        direction is reversed), and for ``vmf`` ``log_normalizer_min`` and ``_max``.

    Example:
        >>> found = prototype_statistics(Prototypes(8, 3), temperature=0.1)
        >>> float(found["kappa_median"]), float(found["negative_g"])
        (10.0, 0.0)
    """
    magnitude = prototypes.magnitudes().detach()
    levels = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], device=magnitude.device)
    quantiles = torch.quantile(magnitude, levels)
    names = ("min", "p05", "median", "p95", "max")
    out = {f"kappa_{name}": q / temperature for name, q in zip(names, quantiles, strict=True)}
    out |= {f"magnitude_{name}": q for name, q in zip(names, quantiles, strict=True)}
    out["negative_g"] = (prototypes.weight_g < 0).sum().float()
    bias = prototypes.log_normalizer(temperature)
    if bias is not None:
        out["log_normalizer_min"], out["log_normalizer_max"] = bias.aminmax()
    return out


@torch.no_grad()
def drift_statistics(directions: Tensor, mean: Tensor) -> dict[str, float]:
    """Whether prototypes drift away from the data together: a void set before its members are copies.

    The paper (section 5.2) describes the end of it: most prototypes share one direction, opposite to
    the data.

    Args:
        directions: unit prototypes ``(K, p)``.
        mean: mean of ``y`` ``(p,)``; its length does not count.

    Returns:
        ``data_cosine_p05``, ``data_cosine_median`` and ``data_cosine_p95``, quantiles over the prototypes of
        their cosine with the mean; and ``resultant_length``, the length of their own mean direction (0:
        spread out, about ``1 / sqrt(K)`` at random; 1: all the same).

    Example:
        >>> directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> found = drift_statistics(directions, torch.tensor([2.0, 0.0]))
        >>> found["data_cosine_median"], round(found["resultant_length"], 3)
        (-1.0, 0.333)
    """
    directions = directions.float()
    cosines = directions @ F.normalize(mean.to(directions), dim=0)
    quantiles = torch.quantile(cosines, torch.tensor([0.05, 0.5, 0.95], device=cosines.device))
    names = ("data_cosine_p05", "data_cosine_median", "data_cosine_p95")
    found = dict(zip(names, quantiles.tolist(), strict=True))
    return found | {"resultant_length": float(directions.mean(dim=0).norm())}


def duplicate_statistics(directions: Tensor, mean: Tensor, sample: int = 4096) -> dict[str, float]:
    """Unique prototypes, and how the largest duplicate set lies to the data (threshold 0.9).

    Args:
        directions: prototypes ``(K, p)``.
        mean: mean of ``y`` over the epoch ``(p,)``.
        sample: with more prototypes, a random subset of this size is examined, the same one every
            time, so that the values are comparable between epochs. Its unique count is a lower bound for
            the whole; the share of the largest set is an estimate (standard error below 1 % at 4096).

    Returns:
        ``examined_prototypes``, ``unique_prototypes`` (among them), ``largest_duplicate_share`` and
        ``largest_duplicate_cosine`` with the mean (-1 in a void set).

    Example:
        >>> directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> found = duplicate_statistics(directions, torch.tensor([1.0, 0.0]))
        >>> found["unique_prototypes"], found["largest_duplicate_cosine"]
        (2.0, -1.0)
    """
    if len(directions) > sample:
        chosen = torch.randperm(len(directions), generator=torch.Generator().manual_seed(0))
        directions = directions[chosen[:sample].to(directions.device)]
    groups = duplicate_groups(directions, DUPLICATE_THRESHOLD)
    sizes = torch.bincount(groups)
    largest = int(sizes.argmax())
    representative = directions[int((groups == largest).nonzero()[0])].float()
    cosine = F.cosine_similarity(representative, mean.to(representative), dim=0)
    return {
        "examined_prototypes": float(len(directions)),
        "unique_prototypes": float(len(sizes)),
        "largest_duplicate_share": float(sizes.max()) / len(directions),
        "largest_duplicate_cosine": float(cosine),
    }
