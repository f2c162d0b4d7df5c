"""What DINO-vMF is about, of one trained teacher: components in use, precision, Figure 2, image sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinovmf_plugin.analysis.gallery import component_sheets
from dinovmf_plugin.analysis.measurements import (
    measure_precision,
    measure_prototypes,
    score_images,
)
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.embedding import embed
from dinovmf_plugin.features.images import image_folder
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.mixture.precision import PercentileBin
from dinovmf_plugin.mixture.utilization import duplicate_groups
from dinovmf_plugin.report.page import Sheet

__all__ = ["Components", "look_inside"]

DUPLICATE = 0.9
_SHEETS, _IMAGES, _LEAST = 4, 10, 5


@dataclass(frozen=True)
class Components:
    """The mixture of one teacher.

    Attributes:
        measured: plain results for ``results.json``.
        bins: Figure 2, kNN accuracy by percentile of the assigned component's precision; may be empty.
        precise: sheets of the most concentrated components that win at least five images.
        vague: of the least concentrated ones.
    """

    measured: dict[str, Any]
    bins: list[PercentileBin]
    precise: list[Sheet]
    vague: list[Sheet]


def look_inside(
    checkpoint: Path, pictures: Path, size: int, *, k: int, temperature: float, bins: int = 5
) -> Components:
    """Embed the pictures with the teacher and its head, and measure the mixture.

    Args:
        checkpoint: of a finished training.
        pictures: folder with ``train`` and ``val``.
        size: side of the images that the network was trained on.
        k: neighbors of Figure 2.
        temperature: of the kNN votes.
        bins: percentile ranges of Figure 2.
    """
    model = load_network(checkpoint, head=True)
    train = image_folder(str(pictures / "train"), "data.train_path", check_images="none")
    val = image_folder(
        str(pictures / "val"), "data.val_path", classes=train.classes, check_images="none"
    )
    crop = CenterCrop(resize=round(size * 256 / 224), size=size)
    bank, queries = (
        embed(model, images, crop, batch_size=256, num_workers=0, progress=False)
        for images in (train, val)
    )
    measured, hits = measure_prototypes(model, bank.y, (DUPLICATE,), components=False)
    precision = measure_precision(
        model, (train, bank), (val, queries), bins=bins, k=k, temperature=temperature
    )
    found = [PercentileBin(**part) for part in precision.get("bins", [])]
    scored, _ = score_images(make_mixture(model, "model"), [(train, bank.y)])
    groups = duplicate_groups(model.prototypes.directions().detach(), DUPLICATE)
    precise, vague = (
        component_sheets(
            scored[0],
            groups,
            components=_SHEETS,
            images=_IMAGES,
            size=64,
            order=order,
            least=_LEAST,
        )
        for order in ("precise", "vague")
    )
    result = {
        "components": model.prototypes.num_prototypes,
        "used": int((hits > 0).sum()),
        "usage_perplexity": measured["usage"]["usage_perplexity"],
        "unique": measured["utilization"]["greedy"][DUPLICATE]["unique"],
        "largest_duplicate_set": measured["utilization"]["greedy"][DUPLICATE]["largest"],
        "kappa": {
            name: measured["concentration"][f"kappa_{name}"]
            for name in ("min", "p05", "median", "p95", "max")
        },
        "precision": precision,
    }
    return Components(result, found, precise, vague)
