"""Tables of a comparison: header and rows of text, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinovmf_plugin.comparison.paper_ablation import PAPER_ABLATION
from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.comparison.statistics import describe_difference, with_spread
from dinovmf_plugin.report.paper import PAPER

__all__ = ["Table", "ablation_table", "comparison_table", "difference_sentences", "markdown"]

Table = tuple[list[str], list[list[str]]]
NORMALIZATIONS = ("none", "l2", "vmf")
_NAMES = {
    "linear_cls": "linear [C]",
    "linear_dino": "linear [D]",
    "transfer": "transfer",
}
_PAPER_NAMES = {
    "dino_multicrop": "DINO",
    "dino_vmf": "DINO-vMF",
    "ibot": "iBOT",
    "ibot_vmf": "iBOT-vMF",
    "msn": "MSN",
}


def metric_name(metric: str) -> str:
    """A metric as column headers say it.

    Example:
        >>> [metric_name(m) for m in ("knn_k10", "linear_dino", "few_shot_1 per class")]
        ['kNN, k = 10', 'linear [D]', '1 per class']
    """
    if metric.startswith("knn_k"):
        return f"kNN, k = {metric[5:]}"
    return _NAMES.get(metric, metric.removeprefix("few_shot_"))


def markdown(table: Table) -> str:
    """GitHub's table syntax.

    Example:
        >>> print(markdown((["", "logit"], [["vmf", "71.0 ± 1.0"]])))
        |  | logit |
        |---|---:|
        | vmf | 71.0 ± 1.0 |
    """
    header, rows = table
    rule = "|---|" + "---:|" * (len(header) - 1)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(group: Group | None, metric: str) -> str:
    if group is None:
        return "–"
    text = with_spread(group.values(metric))
    lost = len(group.runs) - len(group.values(metric))
    return text + (f" ({lost} of {len(group.runs)} diverged)" if lost else "")


def ablation_table(groups: Sequence[Group], metric: str) -> Table:
    """Table 1's layout: normalisation by centring, ours and the paper's side by side."""
    by_switches = {group.switches: group for group in groups}
    found = dict.fromkeys(centering for _, centering in by_switches)
    centerings = [c for c in ("logit", "probability", "sinkhorn") if c in found]
    printed = [c for c in centerings if ("none", c) in PAPER_ABLATION]
    header = ["normalization", *centerings, *[f"paper, ImageNet: {c}" for c in printed]]
    rows = []
    for normalization in NORMALIZATIONS:
        if not any((normalization, c) in by_switches for c in centerings):
            continue
        row = [normalization]
        row += [_cell(by_switches.get((normalization, c)), metric) for c in centerings]
        row += [f"{PAPER_ABLATION[normalization, c]:.2f}" for c in printed]
        rows.append(row)
    return header, rows


def comparison_table(groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    """One row per group, one column per metric, and the number of seeds."""
    rows = [
        [group.name, *[_cell(group, metric) for metric in metrics], str(len(group.runs))]
        for group in groups
    ]
    return ["", *map(metric_name, metrics), "seeds"], rows


def paper_table(groups: Sequence[Group], architecture: str = "ViT-Small/16") -> Table | None:
    """The paper's ImageNet numbers of the methods that are compared; None if it has none of them."""
    methods = [_PAPER_NAMES.get(str(group.runs[0]["method"])) for group in groups]
    chosen = [r for r in PAPER if r.architecture == architecture and r.method in methods]
    if not chosen:
        return None
    settings = ("1 per class", "2 per class", "5 per class", "1 %")

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    rows = [
        [row.method, text(row.knn), text(row.cls), text(row.dino),
         *[text(row.few_shot.get(s)) for s in settings]]
        for row in chosen
    ]  # fmt: skip
    return [f"paper, ImageNet, {architecture}", "kNN", "linear [C]", "linear [D]", *settings], rows


def utilization_table(groups: Sequence[Group]) -> Table | None:
    """Table 4's numbers (cosine above 0.9 or the threshold nearest to it) and concentrations."""
    rows = []
    for group in groups:
        found: list[dict[str, Any]] = [r["prototypes"] for r in group.runs if r["prototypes"]]
        if not found:
            continue
        at = str(found[0]["void_set"]["threshold"])
        sweeps = [p["utilization"]["greedy"][at] for p in found]
        void = sum(bool(p["void_set"]["is_void"]) for p in found)
        rows.append(
            [
                group.name,
                with_spread([s["unique"] for s in sweeps], 0),
                with_spread([s["largest"] for s in sweeps], 0),
                f"{void} of {len(found)}",
                with_spread([p["usage"]["usage_perplexity"] for p in found], 0),
                *[
                    with_spread([p["concentration"][f"kappa_{q}"] for p in found])
                    for q in ("p05", "median", "p95")
                ],
            ]
        )
    header = ["", "unique prototypes", "largest duplicate set", "runs with a void set"]
    header += ["used (perplexity)", "κ 5 %", "κ median", "κ 95 %"]
    return (header, rows) if rows else None


def difference_sentences(groups: Sequence[Group], metric: str, baseline: Group) -> list[str]:
    """Every group against the baseline; groups without a value are left out."""
    floor = baseline.values(metric)
    return [
        describe_difference(group.name, group.values(metric), baseline.name, floor)
        for group in groups
        if group is not baseline and group.values(metric) and floor
    ]
