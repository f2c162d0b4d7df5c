"""What ``scripts/retrieval.py`` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from dinovmf_plugin.features.settings import Device, NetworkSource
from dinovmf_plugin.runs.bounds import AtLeastOne, Path, Positive, Seed, Whole
from dinovmf_plugin.runs.settings import Doc

__all__ = ["RetrievalSettings"]


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(NetworkSource):
    """Everything that ``scripts/retrieval.py`` can be told; the defaults are DINO's for Oxford."""

    data_path: Annotated[
        Path,
        Doc("holds roxford5k/ and rparis6k/ (each gnd_NAME.pkl and jpg/), or is one of them"),
    ]
    output_dir: Annotated[
        Path, Doc("results.json, report.html, rankings.png; a stopped run continues there")
    ]
    dataset: Annotated[str, Doc("roxford5k, rparis6k or any set in the same layout")] = "roxford5k"
    seed: Annotated[Seed, Doc("of the weights of random:TIMM_NAME")] = 0
    imsize: Annotated[
        Annotated[int, Ge(16)] | None,
        Doc("longest side in pixels, aspect kept, never enlarged; null: the images' own size"),
    ] = 224
    scales: Annotated[
        Sequence[Annotated[Positive, Le(4)]],
        AtLeastOne,
        Doc("factors whose CLS tokens are averaged"),
    ] = (1.0,)
    query_boxes: Annotated[
        bool, Doc("crop queries to their box (the revisited protocol does, DINO does not)")
    ] = False
    show: Annotated[
        Whole | Sequence[str],
        Doc("queries in rankings.png: the first so many, or a list of their names; 0: no picture"),
    ] = 5
    device: Device = "auto"
    num_workers: Annotated[Whole, Doc("processes that read images")] = 4
