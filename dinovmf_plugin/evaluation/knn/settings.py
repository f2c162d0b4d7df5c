"""Knobs of the kNN evaluation; the defaults are DINO's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dinovmf_plugin.evaluation.settings import OneFeature, at_least
from dinovmf_plugin.features.knn import DEFAULT_KS, DEFAULT_TEMPERATURE

__all__ = ["KnnSettings"]


@dataclass(frozen=True)
class KnnSettings(OneFeature):
    """Weighted kNN (DINO)."""

    name: ClassVar[str] = "knn"
    ks: Sequence[int] = DEFAULT_KS
    temperature: float = DEFAULT_TEMPERATURE
    chunk: int = 4096
    query_chunk: int = 1024

    def check(self) -> None:
        """Refuse what cannot work (``ValueError`` naming the key)."""
        super().check()
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"knn.ks={list(self.ks)} must name numbers of neighbours from 1 on")
        if self.temperature <= 0:
            raise ValueError(f"knn.temperature={self.temperature} must be positive")
        at_least("knn.chunk", self.chunk, 1)
        at_least("knn.query_chunk", self.query_chunk, 1)
