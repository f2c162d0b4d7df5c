"""The retrieval evaluation from checkpoint to JSON."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinovmf_plugin.core.vit import has_tokens
from dinovmf_plugin.evaluation.retrieval.dataset import RetrievalSet, load_retrieval_set
from dinovmf_plugin.evaluation.retrieval.descriptors import (
    ExtractionReport,
    ImageFiles,
    extract_descriptors,
)
from dinovmf_plugin.evaluation.retrieval.figure import draw_rankings
from dinovmf_plugin.evaluation.retrieval.page import retrieval_page
from dinovmf_plugin.evaluation.retrieval.scores import (
    DIFFICULTIES,
    query_scores,
    rank_database,
    revisited_scores,
    split_difficulty,
)
from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
from dinovmf_plugin.features.network import load_source
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import file_digest, listing_digest, write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder

__all__ = ["evaluate_retrieval"]

_log = logging.getLogger(__name__)


def _shown(settings: RetrievalSettings, data: RetrievalSet) -> list[int]:
    if isinstance(settings.show, int):
        return list(range(min(settings.show, len(data.queries))))
    return [data.query_index(name) for name in settings.show]


def _boxes(settings: RetrievalSettings, data: RetrievalSet) -> list[Any] | None:
    if not settings.query_boxes:
        return None
    boxes = [truth["bbx"] for truth in data.ground_truth]
    if None in boxes:
        query = data.queries[boxes.index(None)]
        raise ValueError(f"query_boxes=true, but {data.truth_path} has no bbx for query {query!r}")
    return boxes


def _per_query(data: RetrievalSet, ranks: Any) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {name: {} for name in data.queries}
    for difficulty in DIFFICULTIES:
        scores = query_scores(ranks, *split_difficulty(data.ground_truth, difficulty))
        for name, value in zip(data.queries, scores["AP"], strict=True):
            table[name][difficulty] = value
    return table


def evaluate_retrieval(settings: RetrievalSettings) -> dict[str, Any]:
    """Rank the database for every query by the backbone's CLS token and score the rankings.

    Writes ``results.json`` (scores as fractions, settings, speed, versions, AP of every query),
    ``report.html``,
    ``rankings.png`` and the descriptors into ``output_dir``; a stopped run continues there.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileNotFoundError: if the checkpoint, a folder, the ground truth or an image is missing.
        ValueError: if a setting, the ground truth or the output folder cannot be used.
    """
    device = pick_device(settings.device)
    data = load_retrieval_set(settings.data_path, settings.dataset)
    shown, boxes = _shown(settings, data), _boxes(settings, data)
    network = load_source(settings, seed=settings.seed)
    # raw pixels have no feature of images of any size, and must not bind the folder to themselves
    model: Any = network.vit if network.shape is None else network.model
    bound = {
        "task": "retrieval",
        "network": network.identity,
        "data": str(data.folder.resolve()),
        "ground_truth_sha256": file_digest(data.truth_path),
        "images_digest": listing_digest(map(data.image_path, (*data.queries, *data.database))),
        "imsize": settings.imsize,
        "scales": [float(scale) for scale in settings.scales],
        "query_boxes": settings.query_boxes,
        "mean": list(network.statistics.mean),
        "std": list(network.statistics.std),
    }
    files = {
        kind: ImageFiles(
            [data.image_path(name) for name in names], settings.imsize, crop, network.statistics
        )
        for kind, names, crop in (
            ("queries", data.queries, boxes),
            ("database", data.database, None),
        )
    }
    patch_size = tuple(model.patch_embed.patch_size) if has_tokens(model) else (1, 1)
    for pictures in files.values():
        pictures.check_sizes(min(settings.scales), patch_size)
    folder = open_run_folder(settings.output_dir, bound, ("results.json", "report.html"))
    features: dict[str, NDArray[np.float32]] = {}
    speed: dict[str, ExtractionReport] = {}
    for kind, pictures in files.items():
        features[kind], speed[kind] = extract_descriptors(
            model,
            pictures,
            folder / "descriptors" / kind,
            scales=settings.scales,
            device=device,
            num_workers=settings.num_workers,
            name=f"{settings.dataset} {kind}",
        )
        for index in speed[kind]["truncated"]:
            _log.warning("%s ends early; its missing part is gray", pictures.paths[index])
    database, queries = (torch.from_numpy(features[kind]) for kind in ("database", "queries"))
    ranks = rank_database(database, queries)
    results = {
        "task": "retrieval",
        "dataset": settings.dataset,
        "checkpoint": network.record,
        "settings": bound,
        "descriptor": "CLS after the final norm, mean over scales, l2",
        "scores": revisited_scores(ranks, data.ground_truth),
        "average_precision": _per_query(data, ranks),
        "speed": {**speed, "device": str(device)},
        "images": {"database": len(data.database), "queries": len(data.queries)},
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    if shown:
        sheet = draw_rankings(data, np.asarray(ranks), shown)
        write_file(folder / "rankings.png", lambda file: sheet.save(file, format="PNG"))
    architecture = network.shape.name if network.shape is not None else None
    page = retrieval_page(results, network.label, architecture, sheet if shown else None)
    write_file(folder / "report.html", page)
    return results
