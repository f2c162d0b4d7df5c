"""Weighted k nearest neighbors on frozen features (DINO's protocol)."""

from __future__ import annotations

from dinovmf_plugin.evaluation.knn.page import knn_chart, knn_rows
from dinovmf_plugin.evaluation.knn.settings import KnnSettings
from dinovmf_plugin.evaluation.knn.task import prepare_knn
from dinovmf_plugin.evaluation.protocol import Chart, Protocol

__all__ = ["KNN"]

KNN = Protocol(
    name="knn",
    title="Nearest neighbors",
    note="Weighted cosine votes of the k nearest training images. The paper sweeps k and finds 10 best.",
    settings=KnnSettings,
    prepare=prepare_knn,
    rows=knn_rows,
    chart=Chart("Accuracy by the number of neighbors", knn_chart),
)
