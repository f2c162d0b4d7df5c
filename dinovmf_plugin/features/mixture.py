"""The mixture that a network's prototypes stand for."""

from __future__ import annotations

from typing import Annotated

import torch

from dinovmf_plugin.features.network import Network
from dinovmf_plugin.mixture.model import VMFMixture, center_log_weights, prototype_mixture
from dinovmf_plugin.runs.bounds import OneOf
from dinovmf_plugin.runs.settings import Doc

__all__ = ["WEIGHTS", "Weights", "make_mixture"]

WEIGHTS = ("model", "uniform", "center")
Weights = Annotated[
    str,
    OneOf(WEIGHTS),
    Doc("mixture proportions: of the model's own softmax, uniform, or of the stored center"),
]


def make_mixture(model: Network, weights: str) -> VMFMixture:
    """Build the mixture with weights ``model``, ``uniform`` or ``center`` (see ``mixture.model``).

    Raises:
        ValueError: for other names, or ``center`` without a stored center.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is unknown: choose one of {', '.join(WEIGHTS)}")
    prototypes, settings = model.prototypes, model.mixture_head[1]
    log_weights = None
    if weights == "uniform":
        log_weights = torch.zeros(prototypes.num_prototypes)
    elif weights == "center":
        if model.center is None:
            raise ValueError(
                f"weights=center, but {model.record['checkpoint']} holds no center: use weights=model"
            )
        log_weights = center_log_weights(
            model.center,
            centering=settings.centering,
            normalization=settings.normalization,
            temperature=settings.teacher_temperature,
            raw_scores=settings.center_raw_scores,
        )
    if log_weights is not None:
        log_weights = log_weights.to(prototypes.weight_v.device)
    return prototype_mixture(prototypes, settings.teacher_temperature, log_weights)
