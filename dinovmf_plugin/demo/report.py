"""The demo's page: curves, tables and pictures in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dinovmf_plugin.analysis.figures import precision_figure
from dinovmf_plugin.analysis.gallery import thumbnail
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.demo.components import Components
from dinovmf_plugin.features.extraction import extract_features
from dinovmf_plugin.report.learning import LEARNING_NOTE, learning_chart
from dinovmf_plugin.report.page import Page, Sheet
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.report.theme import themed
from dinovmf_plugin.runs.files import write_file
from dinovmf_plugin.training.alarms import LEAST_SHARE

__all__ = ["LabeledImages", "write_report"]

LabeledImages = list[tuple[Tensor, Tensor]]  # batches of images and labels


def _curve(
    ylabel: str,
    draw: Callable[[Axes], None],
    xlabel: str = "epoch",
    size: tuple[float, float] = (5.2, 3.3),
) -> dict[str, bytes]:
    def make() -> Figure:
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        draw(axes)
        if xlabel == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(handles)))
        return figure

    return themed(make)


def _over_epochs(methods: Mapping[str, Any], key: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, result in methods.items():
            records = [r for r in result["epochs"] if key in r]
            axes.plot([r["epoch"] for r in records], [r[key] for r in records], ".-", label=name)

    return draw


def _loss(methods: Mapping[str, Any]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        _over_epochs(methods, "loss")(axes)
        sizes = {r["settings"]["num_prototypes"] for r in methods.values()}
        for size in sizes:
            axes.axhline(math.log(size), linestyle=":", color="#888888", linewidth=1)
            axes.text(0.99, math.log(size), f"log {size}: uniform outputs ", ha="right", va="bottom",
                      transform=axes.get_yaxis_transform(), fontsize=8)  # fmt: skip

    return draw


def _knn(results: Mapping[str, Any], key: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        _over_epochs(results["methods"], "top1")(axes)
        styles = {"untrained": "--", "pixels": ":"}
        for name, accuracy in results["baselines"].items():
            axes.axhline(accuracy[key]["top1"], linestyle=styles[name], color="#888888", label=name)

    return draw


def _monitored(methods: Mapping[str, Any], kind: str, key: str) -> Callable[[Axes], None]:
    x = "step" if kind == "step" else "epoch"
    offset = 0 if kind == "step" else 1

    def draw(axes: Axes) -> None:
        for name, result in methods.items():
            records = [r for r in result["monitor"][kind] if r.get(key) is not None]
            axes.plot([r[x] + offset for r in records], [r[key] for r in records], ".-", label=name)
        axes.set_ylim(bottom=0)

    return draw


def _kappa(methods: Mapping[str, Any]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, result in methods.items():
            records = result["monitor"]["epoch"]
            epochs = [r["epoch"] + 1 for r in records]
            (line,) = axes.plot(epochs, [r["kappa_median"] for r in records], ".-", label=name)
            low, high = ([r[f"kappa_{q}"] for r in records] for q in ("p05", "p95"))
            axes.fill_between(epochs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)

    return draw


def _neighbor_sheets(
    network: nn.Module,
    folder: Path,
    data: tuple[LabeledImages, LabeledImages],
    count: int = 6,
    k: int = 7,
) -> list[Sheet]:
    bank, queries = data
    features, labels = extract_features(network, bank, progress=False)
    query_features, query_labels = extract_features(network, queries, progress=False)
    train, val = (list_images(folder / part) for part in ("train", "val"))
    picks = torch.linspace(0, len(query_features) - 1, count).long()
    similarity = F.normalize(query_features[picks], dim=1) @ F.normalize(features, dim=1).T
    values, indices = similarity.topk(k)
    sheets = []
    for row, pick in enumerate(picks.tolist()):
        truth = int(query_labels[pick])
        pictures = [thumbnail(val.image(pick), 96, caption=f"query: {val.classes[truth]}")]
        for value, index in zip(values[row].tolist(), indices[row].tolist(), strict=True):
            label = int(labels[index])
            mark = "✓" if label == truth else "✗"
            caption = f"{mark} {train.classes[label]} {value:.4f}"  # nearly parallel features
            pictures.append(thumbnail(train.image(index), 96, caption=caption))
        right = int((labels[indices[row]] == truth).sum())
        sheets.append(Sheet(f"Query {row + 1}", f"{right} of {k} neighbors of its class", pictures))
    return sheets


def _mixture(page: Page, methods: Mapping[str, Any], inside: Mapping[str, Components]) -> None:
    page.section("The mixture")
    page.text(
        "Every prototype is a component of a mixture on the sphere; its norm is its precision κ. DINO leaves "
        "the normalizing constant of the components out, DINO-vMF puts it back: see how many components "
        "win images, how far their precisions spread, and whether precise ones hold the easier images."
    )
    rows = []
    for name, result in methods.items():
        found = result["components"]
        kappa = found["kappa"]
        rows.append(
            [name, found["used"], found["usage_perplexity"], found["unique"],
             f"{kappa['median']:.1f} ({kappa['p05']:.1f} to {kappa['p95']:.1f})",
             result["target_information"], found["precision"].get("spearman"),
             found["precision"].get("p_value")]
        )  # fmt: skip
    header = ["", "win an image", "used (perplexity)", "unique", "κ (5 % to 95 %)"]
    header += ["I, nats", "κ and kNN: Spearman", "p value"]
    page.table(Table(header, rows))
    bins = {name: found.bins for name, found in inside.items() if found.bins}
    page.charts(
        *([(themed(lambda: precision_figure(bins)),
            "kNN accuracy by precision of the assigned component (the paper's Figure 2)")]
          if bins else []),
        (_curve("κ = ‖w‖ / τ", _kappa(methods)), "Concentrations: median, 5th to 95th percentile"),
        (_curve("perplexity", _monitored(methods, "epoch", "usage_perplexity")),
         "Effective number of components that win images"),
        (_curve("unique prototypes", _monitored(methods, "epoch", "unique_prototypes")),
         "Prototypes left when duplicates (cosine > 0.9) are removed"),
    )  # fmt: skip
    for name, found in inside.items():
        for kind, sheets in (("Most", found.precise), ("Least", found.vague)):
            if sheets:
                page.section(f"{kind} precise components: {name}")
            for sheet in sheets:
                page.sheet(sheet)


def write_report(
    path: Path,
    results: Mapping[str, Any],
    crops: Path,
    trained: Mapping[str, nn.Module],
    inside: Mapping[str, Components],
    folder: Path,
    data: tuple[LabeledImages, LabeledImages],
    recipe: DictConfig,
) -> None:
    """Write the page.

    Args:
        path: file to write.
        results: what results.json will hold.
        crops: sheet of the first crops that a run wrote; may be missing.
        trained: teacher backbones by method.
        inside: their mixtures by method.
        folder: the pictures, with ``train`` and ``val``.
        data: batches of bank and queries, in the folders' order.
        recipe: the parsed recipe of the first method.
    """
    methods, key = results["methods"], f"k{results['settings']['knn']['k']}"
    about, images = results["data"], results["images"]
    page = Page(
        " and ".join(methods) + ": a first run",
        f"{about['package']} · {images['train']:,} training and {images['val']:,} held-out images · "
        f"{recipe.backbone.name}, {recipe.max_epochs} epochs · {results['seconds'] / 60:.1f} minutes",
    )
    facts: dict[str, object] = {
        f"{name}: kNN top-1, {key[1:]} neighbors": f"{result['knn'][key]['top1']:.1f} %"
        for name, result in methods.items()
    }
    for name, accuracy in results["baselines"].items():
        facts[f"{name}: the same"] = f"{accuracy[key]['top1']:.1f} %"
    for name, result in methods.items():
        found = result["components"]
        facts[f"{name}: components that win images, of {found['components']:,}"] = found["used"]
    page.facts(facts)
    page.section("Result")
    page.text(
        "Weighted kNN on the frozen teacher's CLS token, in percent of the held-out images; beside it raw "
        "pixels and the same backbone before training. A small backbone, minutes and one seed: enough to "
        "see that the features are learnt, not to rank the methods."
    )
    rows_of = {**results["baselines"], **{m: r["knn"] for m, r in methods.items()}}
    ks = list(next(iter(rows_of.values())))
    rows = [
        [name, *[f"{accuracy[k]['top1']:.1f}" for k in ks],
         methods[name]["gain_over_untrained"] if name in methods else None]
        for name, accuracy in rows_of.items()
    ]  # fmt: skip
    page.table(Table(["features", *[f"k = {k[1:]}" for k in ks], "over untrained"], rows))
    page.section("Does it learn?")
    page.text(LEARNING_NOTE)
    steps = {name: result["monitor"]["step"] for name, result in methods.items()}
    learnt = learning_chart(steps, LEAST_SHARE, compact=True)
    page.charts(
        *([(learnt, "Information about the image in targets and student")] if learnt else []),
        (_curve(f"kNN top-1 (%), k = {key[1:]}", _knn(results, key)), "kNN of the teacher over time"),
        (_curve("loss", _loss(methods)), "Self-distillation loss"),
    )  # fmt: skip
    alarms = [(name, a["message"]) for name, r in methods.items() for a in r["monitor"]["alarm"]]
    for name, message in alarms:
        page.text(f"{name}: {message}", note=True)
    _mixture(page, methods, inside)
    page.section("What the networks see")
    if crops.is_file():
        page.text(
            f"The first images, one row each: {recipe.data.num_large_crops} global and "
            f"{recipe.data.num_small_crops} local crops. A person should see which belong together."
        )
        with Image.open(crops) as picture:
            page.picture(picture, "crops of the first training images")
    for name, network in trained.items():
        page.section(f"Nearest neighbors: {name}")
        for sheet in _neighbor_sheets(network, folder, data):
            page.sheet(sheet)
    page.text(f"Pictures: {about['note']}. License: {about['license']}.", note=True)
    shown = {k: results[k] for k in ("settings", "recipe", "versions")}
    page.details("Settings and versions", json.dumps(shown, indent=2))
    write_file(path, page.html())
