"""The whole analysis, from checkpoint and images to analysis.json and analysis.html."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dinovmf_plugin.analysis import figures
from dinovmf_plugin.analysis.attention import cls_attention, save_attention
from dinovmf_plugin.analysis.gallery import (
    component_sheets,
    component_table,
    image_table,
    ranked_sheet,
)
from dinovmf_plugin.analysis.measurements import (
    make_mixture,
    measure_precision,
    measure_prototypes,
    score_images,
)
from dinovmf_plugin.analysis.page import analysis_page, gallery_page
from dinovmf_plugin.analysis.settings import AnalysisSettings
from dinovmf_plugin.analysis.tables import save_table
from dinovmf_plugin.core.vit import is_vit, last_attention, patch_grid
from dinovmf_plugin.data.decoding import open_image
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.embedding import Embeddings, embed
from dinovmf_plugin.features.images import ImageSet, image_folder
from dinovmf_plugin.features.network import Network, load_source
from dinovmf_plugin.mixture.model import log_uniform_density
from dinovmf_plugin.mixture.precision import PercentileBin
from dinovmf_plugin.mixture.utilization import duplicate_groups
from dinovmf_plugin.report.learning import learning_chart
from dinovmf_plugin.report.page import Sheet, Thumbnail
from dinovmf_plugin.report.theme import themed
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.training.alarms import LEAST_SHARE
from dinovmf_plugin.training.curve import read_monitor

__all__ = ["AnalysisSettings", "analyze", "format_analysis"]


def _transform(settings: AnalysisSettings, model: Network) -> CenterCrop:
    size = settings.data.crop_size or model.image_size
    resize = settings.data.resize or round(size * 256 / 224)
    return CenterCrop(resize=resize, size=size, interpolation=settings.data.interpolation)


def _measure(
    settings: AnalysisSettings, model: Network, sets: list[ImageSet]
) -> tuple[dict[str, Any], list[Embeddings], Tensor]:
    """Results of one model, the embeddings of the sets, and the images each prototype wins."""
    transform = _transform(settings, model)
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


def _charts(
    result: Mapping[str, Any], model: Network, hits: Tensor, likelihoods: Mapping[str, Tensor]
) -> dict[str, dict[str, bytes]]:
    models = {result["name"]: result, **result["comparison"]}
    sweeps = {
        name: {float(t): count for t, count in found["utilization"]["greedy"].items()}
        for name, found in models.items()
    }
    bins = {
        name: [PercentileBin(**part) for part in found["precision"]["bins"]]
        for name, found in models.items()
        if "bins" in found["precision"]
    }
    kappa = model.prototypes.concentration(model.mixture_head[1].teacher_temperature)
    draw: dict[str, Callable[[], Figure]] = {
        "utilization": partial(figures.utilization_figure, sweeps),
        "concentration": partial(
            figures.concentration_figure, kappa.detach().cpu().numpy(), hits.numpy()
        ),
        "likelihood": partial(
            figures.likelihood_figure,
            {name: value.numpy() for name, value in likelihoods.items()},
            log_uniform_density(model.prototypes.dim),
        ),
        "circle": figures.circle_figure,
        "normalizer": partial(figures.normalizer_figure, order=model.prototypes.order),
        "normalizer_error": partial(figures.normalizer_error_figure, order=model.prototypes.order),
    }
    if bins:
        draw["precision"] = partial(figures.precision_figure, bins)
    drawn = {name: themed(function) for name, function in draw.items()}
    learning = learning_chart(_records(models), LEAST_SHARE)
    return drawn if learning is None else {**drawn, "learning": learning}


def _records(models: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the monitors wrote beside the checkpoints (or beside ``previous/``)."""
    found = {}
    for name, result in models.items():
        folder = Path(result["checkpoint"]).parent
        folder = folder.parent if folder.name == "previous" else folder
        found[name] = read_monitor(folder)["step"]
    return found


@torch.no_grad()
def _attention(
    settings: AnalysisSettings,
    model: Network,
    images: ImageSet,
    folder: Path,
) -> list[Path]:
    """Sheets of evenly spaced images, or of all images of ``attention.path``."""
    transform = model.normalized(_transform(settings, model))
    count = len(images) if settings.attention.path else min(settings.attention.images, len(images))
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    paths: list[Path] = []
    for index in tqdm(chosen, desc="attention maps", unit="img"):
        path = Path(images.path(int(index)))
        pixels = transform(open_image(path))
        maps = cls_attention(
            last_attention(model.vit, pixels[None].to(model.prototypes.weight_v.device)),
            patch_grid(model.vit, *pixels.shape[-2:]),
        )
        shown = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        # the index keeps equal file names of different classes apart
        stem = os.fsdecode(os.fsencode(path.stem)[:200])  # with index and suffix within 255 bytes
        paths += save_attention([shown], maps.cpu(), [f"{index:06d}_{stem}"], folder)
    return paths


def check_utf8(images: ImageSet) -> None:
    """Refuse names that Parquet cannot hold, before any computing.

    Raises:
        ValueError: naming the first file whose name is no UTF-8.
    """
    for index in range(len(images)):
        path = images.path(index)
        try:
            os.fsencode(path).decode("utf-8")
        except UnicodeDecodeError as error:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise ValueError(
                f"table=parquet cannot hold the file name {shown}, which is no UTF-8: use table=csv, which "
                "keeps its bytes, or rename the file"
            ) from error


def _attention_sheet(paths: list[Path], heads: int) -> list[Sheet]:
    width = 96 * (heads + 2)
    pictures = []
    for path in paths:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            # twice the CSS size is enough for dense screens
            image.thumbnail((2 * width, 2 * width))
            image.convert("RGB").save(buffer, format="JPEG", quality=85)
        pictures.append(Thumbnail(buffer.getvalue(), width, title=path.stem))
    return [Sheet("Self-attention", f"{heads} heads; PNG files in attention/", pictures)]


def analyze(settings: AnalysisSettings) -> dict[str, Any]:
    """Analyse a checkpoint on images and write the results into ``settings.output_dir``.

    Writes analysis.json, analysis.html, gallery.html, images.* and components.* (CSV or Parquet),
    figures/*.svg and attention/*.png.

    Returns:
        What analysis.json holds.

    Raises:
        FileNotFoundError: if the checkpoint or a folder is missing.
        ValueError: if a setting, the checkpoint, an image or the output folder cannot be used.
    """
    device = pick_device(settings.device)
    data = settings.data
    train = image_folder(
        data.train_path,
        "data.train_path",
        labeled="auto",
        fraction=data.fraction,
        skip_unreadable=data.skip_unreadable,
    )
    sets = [train]
    if data.val_path:
        sets.append(
            image_folder(
                data.val_path,
                "data.val_path",
                classes=train.classes,
                labeled="auto",
                fraction=data.fraction,
                skip_unreadable=data.skip_unreadable,
            )
        )
    if settings.table == "parquet":
        for images in sets:
            check_utf8(images)
    shown = sets[-1]
    if settings.attention.path:
        shown = image_folder(settings.attention.path, "attention.path", labeled="auto")
    model = load_source(settings, head=True).to(device)
    if settings.attention.path and not is_vit(model.model):
        raise ValueError(
            f"attention.path={settings.attention.path} needs a Vision Transformer: {settings.checkpoint} "
            "has no attention of a CLS token"
        )
    others = {
        name: load_source(replace(settings, checkpoint=path), head=True).to(device)
        for name, path in settings.others.items()
    }
    name = settings.name or model.mixture_head[1].method
    if name in others:
        raise ValueError(f"compare has a model of the same name {name!r}: set name to another one")
    mixture = make_mixture(model, settings.weights)
    loaded = {"checkpoint": model, **others}
    digests = {key: network.record["sha256"] for key, network in loaded.items()}
    # Only now: what cannot be analysed must not bind the folder to itself.
    bound = {**settings.identity(), "sha256": digests}
    folder = open_run_folder(
        settings.output_dir, bound, ("analysis.json", "analysis.html", "gallery.html")
    )

    measured, found, hits = _measure(settings, model, sets)
    scored, summary = score_images(
        mixture, [(images, part.y) for images, part in zip(sets, found, strict=True)]
    )
    result: dict[str, Any] = {
        "name": name,
        "which": settings.which,
        "images": {images.name: len(images) for images in sets},
        **measured,
        "mixture": {"weights": settings.weights, **summary},
        "comparison": {key: _measure(settings, other, sets)[0] for key, other in others.items()},
        "settings": {**bound, "device": str(device)},
        "versions": versions(),
    }
    groups = duplicate_groups(mixture.directions, result["void_set"]["threshold"])
    save_table(image_table(scored), folder, "images", settings.table)
    save_table(component_table(mixture, groups, scored[0]), folder, "components", settings.table)
    sheets = component_sheets(
        scored[0],
        groups,
        components=settings.gallery.components,
        images=settings.gallery.images,
        size=settings.gallery.size,
        progress=True,
    )
    ranked = [
        ranked_sheet(
            scored, title, settings.gallery.outliers, least=least, size=settings.gallery.size
        )
        for title, least in (("Least likely images", True), ("Most likely images", False))
    ]
    charts = _charts(
        result, model, hits, {part.images.name: part.scores.log_likelihood for part in scored}
    )
    for key, themes in charts.items():
        write_file(folder / "figures" / f"{key}.svg", themes["light"])
    seen = is_vit(model.model)
    maps = _attention(settings, model, shown, folder / "attention") if seen else []
    result["attention"] = [str(path.relative_to(folder)) for path in maps]
    heads = int(model.vit.blocks[-1].attn.num_heads) if seen else 0
    page = analysis_page(
        result, charts, sheets, ranked, _attention_sheet(maps, heads) if maps else []
    )
    for file, text in (
        ("analysis.html", page.html()),
        ("gallery.html", gallery_page(name, sheets, ranked).html()),
    ):
        write_file(folder / file, text.encode("utf-8", "replace"))
    write_json(folder / "analysis.json", result)
    return result


def format_analysis(result: Mapping[str, Any]) -> str:
    """Table 4 of the models in a result, as text.

    Example:
        >>> void = {"threshold": 0.9, "is_void": False}
        >>> found = {"utilization": {"greedy": {"0.9": {"unique": 961, "largest": 2087}}}, "void_set": void}
        >>> print(format_analysis({"name": "DINO", "comparison": {}, **found}))
        model               unique   largest  void set   (cosine > 0.9)
        DINO                   961      2087        no
    """
    models = {result["name"]: result, **result["comparison"]}
    at = str(result["void_set"]["threshold"])
    lines = [f"{'model':<16}{'unique':>10}{'largest':>10}{'void set':>10}   (cosine > {at})"]
    for name, found in models.items():
        count = found["utilization"]["greedy"][at]
        void = "yes" if found["void_set"]["is_void"] else "no"
        lines.append(f"{name:<16}{count['unique']:>10}{count['largest']:>10}{void:>10}")
    return "\n".join(lines)
