"""kNN from images to numbers."""

from __future__ import annotations

import warnings
from typing import Any

from dinovmf_plugin.evaluation.knn.settings import KnnSettings
from dinovmf_plugin.evaluation.settings import EvaluationSettings
from dinovmf_plugin.evaluation.workbench import Images, Run, Workbench
from dinovmf_plugin.features.images import describe
from dinovmf_plugin.features.knn import knn_accuracy

__all__ = ["prepare_knn"]


def prepare_knn(settings: KnnSettings, images: Images, run: EvaluationSettings) -> Run:
    """Check that the bank serves at least one k; those it cannot serve are skipped and recorded."""
    bank, _ = len(images.train), len(images.val)
    ks = sorted(k for k in set(settings.ks) if k <= bank)
    if not ks:
        raise ValueError(
            f"knn.ks={list(settings.ks)}: data.train_path holds only {bank} images, use k <= {bank}"
        )

    skipped = sorted(set(settings.ks) - set(ks))
    if skipped:
        warnings.warn(f"knn.ks: {skipped} are skipped, the bank holds {bank} images", stacklevel=2)

    def knn(bench: Workbench) -> dict[str, Any]:
        wanted, crop = {"feature": settings.feature}, bench.transform(settings)
        train, train_labels = bench.features(images.train, wanted, crop)
        val, val_labels = bench.features(images.val, wanted, crop)
        found = knn_accuracy(
            train["feature"],
            train_labels,
            val["feature"].to(bench.device),
            val_labels,
            ks=ks,
            temperature=settings.temperature,
            chunk=settings.chunk,
            query_chunk=settings.query_chunk,
            distributed=bench.processes.active,
            progress=bench.progress,
        )
        return {
            **{f"k{k}": {"top1": top1, "top5": top5} for k, (top1, top5) in found.items()},
            "skipped_ks": skipped,
            "feature": bench.describe_feature(settings.feature),
            "transform": describe(crop, run.data.format),
            "train_images": bank,
            "val_images": len(val_labels),
        }

    return knn
