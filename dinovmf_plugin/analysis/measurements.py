"""What is measured on one model: utilisation, void set, usage, the mixture, precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from dinovmf_plugin.features.embedding import Embeddings, assign
from dinovmf_plugin.features.images import ImageSet
from dinovmf_plugin.features.knn import vote_ranks
from dinovmf_plugin.features.neighbors import nearest_neighbors
from dinovmf_plugin.features.network import Network
from dinovmf_plugin.mixture.model import (
    ImageScores,
    VMFMixture,
    log_uniform_density,
    typicality,
)
from dinovmf_plugin.mixture.precision import accuracy_by_percentile, precision_trend
from dinovmf_plugin.mixture.statistics import (
    drift_statistics,
    prototype_statistics,
    usage_statistics,
)
from dinovmf_plugin.mixture.utilization import duplicate_groups, utilization, void_set

__all__ = [
    "Scored",
    "component_labels",
    "knn_correct",
    "measure_precision",
    "measure_prototypes",
    "score_images",
]


def measure_prototypes(
    model: Network,
    y: Tensor,
    thresholds: Sequence[float],
    *,
    components: bool = True,
    progress: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """Utilisation sweep, void set, drift, usage and concentrations.

    Args:
        model: the network.
        y: unit vectors of the training images ``(N, p)``.
        thresholds: cosines of the sweep; the void set is described at 0.9, or at the threshold
            nearest to it.
        components: whether to count connected components too.
        progress: whether to show progress bars.

    Returns:
        Plain results, and the images that each prototype wins ``(K,)``.
    """
    prototypes, temperature = model.prototypes, model.mixture_head[1].teacher_temperature
    directions = prototypes.directions().detach()
    won = assign(prototypes, y, temperature)
    hits = torch.bincount(won, minlength=prototypes.num_prototypes)
    sweep: dict[str, Any] = {"greedy": utilization(directions, thresholds, progress=progress)}
    if components:
        sweep["components"] = utilization(
            directions, thresholds, method="components", progress=progress
        )
    at = min(thresholds, key=lambda value: abs(value - 0.9))
    found = void_set(directions, duplicate_groups(directions, at), y.mean(dim=0), hits)
    result = {
        "utilization": sweep,
        "void_set": {"threshold": at, **asdict(found), "is_void": found.is_void},
        "drift": drift_statistics(directions, y.mean(dim=0)),
        "usage": {
            "images": len(y),
            "winning_prototypes": int((hits > 0).sum()),
            **{name: float(value) for name, value in usage_statistics(hits).items()},
        },
        "concentration": {
            name: float(value)
            for name, value in prototype_statistics(prototypes, temperature).items()
        },
    }
    return result, hits


@dataclass(frozen=True)
class Scored:
    """Scores of one set of images.

    Attributes:
        images: the set.
        scores: of the mixture.
        typicality: share of training images that are at most as likely.
    """

    images: ImageSet
    scores: ImageScores
    typicality: Tensor


def score_images(
    mixture: VMFMixture, sets: Sequence[tuple[ImageSet, Tensor]]
) -> tuple[list[Scored], dict[str, Any]]:
    """Score sets of images; the first is the reference for typicality.

    Args:
        mixture: the model.
        sets: (images, unit vectors) each.

    Returns:
        Scores per set, and a summary: mean log-likelihood, responsibility and entropy; with labels
        the purity of the components and their mutual information with the classes.
    """
    scores = [mixture.score(y.to(mixture.directions.device)) for _, y in sets]
    reference = scores[0].log_likelihood
    scored = [
        Scored(images, found, typicality(found.log_likelihood, reference))
        for (images, _), found in zip(sets, scores, strict=True)
    ]
    summary: dict[str, Any] = {
        "log_density_of_uniform": log_uniform_density(mixture.directions.shape[1])
    }
    for part in scored:
        own = part.scores
        summary[part.images.name] = {
            "log_likelihood": float(own.log_likelihood.mean()),
            "responsibility": float(own.responsibility.mean()),
            "entropy": float(own.entropy.mean()),
            "typicality": float(part.typicality.mean()),
            "components_used": len(own.component.unique()),
            **_label_agreement(own.component, part.images),
        }
    return scored, summary


def _label_agreement(component: Tensor, images: ImageSet) -> dict[str, float]:
    if not images.classes:
        return {}
    counts = component_labels(component, images)
    largest = sum(int(count.max()) for count in counts.values())
    information = normalized_mutual_info_score(images.labels.numpy(), component.numpy())
    return {"purity": largest / len(component), "nmi": float(information)}


def component_labels(component: Tensor, images: ImageSet) -> dict[int, Tensor]:
    """Images per class of every component that has an image: ``{component: (classes,)}``."""
    out = {}
    for k in component.unique().tolist():
        members = images.labels[component == k]
        out[k] = torch.bincount(members, minlength=len(images.classes))
    return out


def knn_correct(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    progress: bool = False,
) -> Tensor:
    """Whether weighted kNN (protocol of ``evaluation.knn``) classifies each query, bool ``(Q,)``.

    Raises:
        ValueError: if ``k`` exceeds the bank.
    """
    similarity, index = nearest_neighbors(bank, queries, k, progress=progress)
    classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    ranks = vote_ranks(
        similarity, bank_labels[index], query_labels, classes, ks=[k], temperature=temperature
    )
    return ranks[k] == 0


def measure_precision(
    model: Network,
    bank: tuple[ImageSet, Embeddings],
    queries: tuple[ImageSet, Embeddings] | None,
    *,
    bins: int,
    k: int,
    temperature: float,
    progress: bool = False,
) -> dict[str, Any]:
    """Figure 2: kNN accuracy by percentile of the norm of the assigned prototype.

    Returns:
        ``{"skipped": reason}`` where the question makes no sense (no labels, equal norms); else the
        bins, the trend over single images, and the accuracy over all.
    """
    if queries is None:
        return {"skipped": "data.val_path is not set"}
    if not (bank[0].classes and queries[0].classes):
        return {"skipped": "the images have no class folders"}
    norms = model.prototypes.magnitudes().detach().cpu()
    if float(norms.max() - norms.min()) <= 1e-6 * float(norms.max()):
        return {"skipped": "all prototypes have the same norm"}
    k = min(k, len(bank[0]))
    correct = knn_correct(
        bank[1].features,
        bank[0].labels,
        queries[1].features,
        queries[0].labels,
        k=k,
        temperature=temperature,
        progress=progress,
    )
    won = assign(model.prototypes, queries[1].y, model.mixture_head[1].teacher_temperature)
    assigned, right = norms[won].numpy(), correct.cpu().numpy()
    groups = accuracy_by_percentile(assigned, right, min(bins, len(right)))
    return {
        "k": k,
        "accuracy": float(100 * np.mean(right)),
        **precision_trend(assigned, right),
        "bins": [group.as_dict() for group in groups],
    }
