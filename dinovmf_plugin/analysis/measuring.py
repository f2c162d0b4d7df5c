"""What is measured on one model: its prototypes on the images' embeddings, and its precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dinovmf_plugin.analysis.measurements import measure_precision, measure_prototypes
from dinovmf_plugin.analysis.settings import AnalysisSettings
from dinovmf_plugin.features.embedding import Embeddings, embed
from dinovmf_plugin.features.images import ImageSet
from dinovmf_plugin.features.network import Network

__all__ = ["measure_model"]


def measure_model(
    settings: AnalysisSettings, model: Network, sets: list[ImageSet]
) -> tuple[dict[str, Any], list[Embeddings], Tensor]:
    """Results of one model, the embeddings of the sets, and the images each prototype wins."""
    transform = settings.data.transform(model.image_size)
    found = [
        embed(
            model,
            images,
            transform,
            batch_size=settings.data.batch_size,
            num_workers=settings.data.num_workers,
        )
        for images in sets
    ]
    measured, hits = measure_prototypes(
        model,
        found[0].y,
        settings.utilization.thresholds,
        components=settings.utilization.components,
        progress=True,
    )
    # JSON has string keys; the page reads the same dictionary
    sweeps = {
        reading: {str(threshold): count for threshold, count in sweep.items()}
        for reading, sweep in measured["utilization"].items()
    }
    own = model.mixture_head[1]
    precision = settings.precision
    result = {
        "checkpoint": model.record["checkpoint"],
        "method": own.method,
        "normalization": own.normalization,
        "centering": own.centering,
        "temperature": own.teacher_temperature,
        "assumed": list(own.assumed),
        "num_prototypes": model.prototypes.num_prototypes,
        "bottleneck_dim": model.prototypes.dim,
        "crop_size": transform.size,
        **model.statistics._asdict(),
        **measured,
        "utilization": sweeps,
        "precision": measure_precision(
            model,
            (sets[0], found[0]),
            (sets[1], found[1]) if len(sets) > 1 else None,
            bins=precision.bins,
            k=precision.k,
            temperature=precision.temperature,
            progress=True,
        ),
        "load_report": model.record["load_report"],
    }
    return result, found, hits
