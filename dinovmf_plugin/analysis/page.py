"""The page that shows an analysis: analysis.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin.report.learning import LEARNING_NOTE
from dinovmf_plugin.report.page import Page, Sheet
from dinovmf_plugin.report.tables import Table

__all__ = ["analysis_page", "gallery_page"]

_SHEETS = 8


def _facts(result: Mapping[str, Any]) -> dict[str, object]:
    at = str(result["void_set"]["threshold"])
    count = result["utilization"]["greedy"][at]
    facts: dict[str, object] = {
        f"unique of {result['num_prototypes']:,} prototypes (cosine {at})": count["unique"],
        "largest duplicate set": count["largest"],
        "prototypes that win an image": result["usage"]["winning_prototypes"],
        "usage perplexity": result["usage"]["usage_perplexity"],
        "median concentration κ": result["concentration"]["kappa_median"],
        "void set": "yes" if result["void_set"]["is_void"] else "no",
    }
    if "accuracy" in result["precision"]:
        facts[f"kNN top-1 (k {result['precision']['k']})"] = (
            f"{result['precision']['accuracy']:.1f} %"
        )
    return facts


def _utilization(page: Page, models: Mapping[str, Mapping[str, Any]], chart: Any) -> None:
    page.section("Prototype utilisation")
    page.text(
        "Two prototypes are duplicates if the cosine of their directions exceeds the threshold. Unique "
        "is what remains when duplicates are removed (greedy cover, lowest index first); connected "
        "components join chains of neighbors and are a check."
    )
    page.charts(
        (chart, "Unique prototypes and largest duplicate set (the paper's Figures 6 and 7)")
    )
    rows = []
    for name, result in models.items():
        sweep = result["utilization"]
        for threshold, count in sweep["greedy"].items():
            linked = sweep.get("components", {}).get(threshold, {})
            rows.append(
                [
                    name,
                    threshold,
                    count["unique"],
                    count["largest"],
                    linked.get("unique"),
                    linked.get("largest"),
                ]
            )
    page.table(
        Table(
            ["model", "threshold", "unique", "largest set", "components", "largest component"], rows
        )
    )
    rows = [
        [
            name,
            found["size"],
            f"{found['share']:.1%}",
            f"{found['cosine_with_mean']:.4f}",
            found["hits"],
            "yes" if found["is_void"] else "no",
            f"{drift['data_cosine_median']:.2f}",
            f"{drift['resultant_length']:.2f}",
        ]
        for name, found, drift in (
            (name, result["void_set"], result["drift"]) for name, result in models.items()
        )
    ]
    page.text(
        "A void set is a large duplicate set that points away from the data (cosine -1 with the mean "
        "of y) and wins no image. One begins to form where prototypes drift away from the data "
        "together: their median cosine with the mean of y falls, and the length of their own mean "
        "direction (0: spread out, 1: all the same) rises. The largest duplicate set, and the drift of all:"
    )
    header = ["model", "size", "share", "cosine with mean", "images won", "void set"]
    header += ["all: median cosine with mean", "all: mean direction"]
    page.table(Table(header, rows))


def _precision(page: Page, models: Mapping[str, Mapping[str, Any]], chart: Any) -> None:
    page.section("Precision and difficulty")
    if chart:
        page.text(
            "Validation images sorted by the norm of the prototype that they are assigned to; within "
            "each percentile range, how many kNN classifies correctly. For DINO-vMF the paper finds "
            "precise components to hold easier images."
        )
        page.charts((chart, "kNN accuracy by percentile of the prototype's norm (Figure 2)"))
        measured = {name: found["precision"] for name, found in models.items()}
        rows = [
            [name, p["accuracy"], p["spearman"], p["p_value"]]
            for name, p in measured.items()
            if "bins" in p
        ]
        page.table(Table(["model", "kNN top-1 (%)", "Spearman", "p value"], rows))
    for name, found in models.items():
        if "skipped" in found["precision"]:
            page.text(f"Not measured for {name}: {found['precision']['skipped']}.", note=True)


def analysis_page(
    result: Mapping[str, Any],
    charts: Mapping[str, Mapping[str, bytes]],
    sheets: Sequence[Sheet],
    ranked: Sequence[Sheet],
    attention: Sequence[Sheet],
) -> Page:
    """Lay out the results.

    Args:
        result: what analysis.json holds.
        charts: SVG per theme by name: ``utilization, precision, concentration, likelihood, circle,
            normalizer, normalizer_error``; ``precision``, and ``learning`` of a training whose
            monitor.jsonl lies beside the checkpoint, may be missing.
        sheets: components, most used first.
        ranked: outliers and typical images.
        attention: attention sheets.
    """
    name = result["name"]
    images = " and ".join(f"{count:,} {key}" for key, count in result["images"].items())
    page = Page(
        f"The mixture of {name}",
        f"{Path(result['checkpoint']).name} ({result['which']}) · normalization "
        f"{result['normalization']} · {result['num_prototypes']:,} prototypes in "
        f"{result['bottleneck_dim']} dimensions · temperature {result['temperature']:g} · "
        f"{images} images",
    )
    page.facts(_facts(result))
    models = {name: result, **result["comparison"]}
    _utilization(page, models, charts["utilization"])
    page.section("Concentration and usage")
    page.charts(
        (charts["concentration"], "Concentrations of the components, and images per component")
    )
    _precision(page, models, charts.get("precision"))
    page.section("Components")
    page.text(
        "The most used components with the images closest to their mean direction; copies of a component "
        f"count as one. {len(sheets)} of them are in gallery.html, all images in the table images.*."
    )
    for sheet in sheets[:_SHEETS]:
        page.sheet(sheet)
    if "learning" in charts:
        page.section("Did it learn?")
        page.text(LEARNING_NOTE)
        page.charts((charts["learning"], "Information about the image in targets and student"))
    page.section("Likelihood and outliers")
    page.text(
        "Log-likelihood of the images under the mixture (weights: "
        f"{result['mixture']['weights']}), relative to a uniform distribution on the sphere."
    )
    page.charts((charts["likelihood"], "Log-likelihood of the images"))
    for sheet in ranked:
        page.sheet(sheet)
    if attention:
        page.section("Attention")
        page.text("The image, the mean over heads, then every head: CLS to patches, last block.")
        for sheet in attention:
            page.sheet(sheet)
    page.section("The normalizer")
    page.charts(
        (charts["circle"], "vMF densities around one direction, two magnitudes (Figure 3)"),
        (charts["normalizer"], "Approximated log-normalizer, up to a constant (Figure 4)"),
        (charts["normalizer_error"], "Its error against the exact Bessel function (Figure 5)"),
    )
    page.details("Settings and versions", json.dumps(result["settings"], indent=2))
    page.details("Loaded weights", result["load_report"])
    return page


def gallery_page(name: str, sheets: Sequence[Sheet], ranked: Sequence[Sheet]) -> Page:
    """All component sheets, and the ranked images: gallery.html."""
    page = Page(f"Components of {name}", f"the {len(sheets)} most used components")
    page.section("Components")
    for sheet in sheets:
        page.sheet(sheet)
    page.section("Outliers and typical images")
    for sheet in ranked:
        page.sheet(sheet)
    return page
