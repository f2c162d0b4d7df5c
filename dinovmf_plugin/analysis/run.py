"""The whole analysis, from checkpoint and images to analysis.json and analysis.html."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dinovmf_plugin.analysis.attention import attention_thumbnails, save_model_attention
from dinovmf_plugin.analysis.charts import analysis_charts
from dinovmf_plugin.analysis.gallery import (
    component_sheets,
    component_table,
    image_table,
    ranked_sheet,
)
from dinovmf_plugin.analysis.measurements import score_images
from dinovmf_plugin.analysis.measuring import measure_model
from dinovmf_plugin.analysis.page import analysis_page, gallery_page
from dinovmf_plugin.analysis.settings import AnalysisSettings
from dinovmf_plugin.analysis.tables import check_utf8, save_table
from dinovmf_plugin.core.vit import is_vit
from dinovmf_plugin.features.images import image_folder
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import load_source
from dinovmf_plugin.mixture.utilization import duplicate_groups
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder

__all__ = ["AnalysisSettings", "analyze", "format_analysis"]


def analyze(settings: AnalysisSettings) -> dict[str, Any]:
    """Analyze a checkpoint on images and write the results into ``settings.output_dir``.

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
        keys=data,
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
                keys=data,
            )
        )
    if settings.table == "parquet":
        for images in sets:
            check_utf8(images.path(index) for index in range(len(images)))
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
    # Only now: what cannot be analyzed must not bind the folder to itself.
    bound = {**settings.identity(), "sha256": digests}
    folder = open_run_folder(
        settings.output_dir, bound, ("analysis.json", "analysis.html", "gallery.html")
    )

    measured, found, hits = measure_model(settings, model, sets)
    scored, summary = score_images(
        mixture, [(images, part.y) for images, part in zip(sets, found, strict=True)]
    )
    result: dict[str, Any] = {
        "name": name,
        "which": settings.which,
        "images": {images.name: len(images) for images in sets},
        **measured,
        "mixture": {"weights": settings.weights, **summary},
        "comparison": {
            key: measure_model(settings, other, sets)[0] for key, other in others.items()
        },
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
    charts = analysis_charts(
        result, model, hits, {part.images.name: part.scores.log_likelihood for part in scored}
    )
    for key, themes in charts.items():
        write_file(folder / "figures" / f"{key}.svg", themes["light"])
    seen = is_vit(model.model)
    count = len(shown) if settings.attention.path else min(settings.attention.images, len(shown))
    crop = settings.data.transform(model.image_size)
    maps = save_model_attention(model, crop, shown, count, folder / "attention") if seen else []
    result["attention"] = [str(path.relative_to(folder)) for path in maps]
    heads = int(model.vit.blocks[-1].attn.num_heads) if seen else 0
    page = analysis_page(
        result, charts, sheets, ranked, [attention_thumbnails(maps, heads)] if maps else []
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
