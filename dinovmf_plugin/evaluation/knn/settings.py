"""Keys of the kNN evaluation; the defaults are DINO's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from dinovmf_plugin.evaluation.settings import OneFeature
from dinovmf_plugin.features.knn import DEFAULT_KS, DEFAULT_TEMPERATURE
from dinovmf_plugin.runs.bounds import AtLeastOne, Count, Positive
from dinovmf_plugin.runs.settings import Doc

__all__ = ["KnnSettings", "Neighbors", "VoteTemperature"]

Neighbors = Annotated[
    Sequence[Count],
    AtLeastOne,
    Doc("numbers of neighbors; more than there are training images are skipped and recorded"),
]
VoteTemperature = Annotated[Positive, Doc("votes weigh exp(similarity / temperature)")]


@dataclass(frozen=True)
class KnnSettings(OneFeature):
    """Weighted kNN (DINO)."""

    name: ClassVar[str] = "knn"
    ks: Neighbors = DEFAULT_KS
    temperature: VoteTemperature = DEFAULT_TEMPERATURE
    chunk: Annotated[Count, Doc("training features per step of the search")] = 4096
    query_chunk: Annotated[Count, Doc("validation features per block")] = 1024
