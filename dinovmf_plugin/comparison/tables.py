"""Tables of a comparison, and where each method breaks as the learning rate rises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dinovmf_plugin.comparison.measures import learnt
from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.comparison.statistics import describe_difference, with_spread
from dinovmf_plugin.report.paper import method_label, paper_ablation, paper_rows
from dinovmf_plugin.report.tables import Table

__all__ = [
    "ablation_table",
    "breaking_points",
    "collapsed_sentences",
    "comparison_table",
    "difference_sentences",
    "paper_table",
    "runs_table",
    "stability_sentences",
    "stability_table",
    "utilization_table",
]

NORMALIZATIONS = ("none", "l2", "vmf")
_NAMES = {
    "linear_cls": "linear [C]",
    "linear_dino": "linear [D]",
    "transfer": "transfer",
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


def _cell(group: Group | None, metric: str) -> str:
    if group is None:
        return "–"
    counts = Counter(group.broken)
    told = ", ".join(f"{n} of {len(group.runs)} {outcome}" for outcome, n in counts.items())
    return with_spread(group.values(metric)) + (f" ({told})" if told else "")


def ablation_table(groups: Sequence[Group], metric: str) -> Table:
    """Table 1's layout: normalization by centering, ours and the paper's side by side."""
    by_switches = {group.switches: group for group in groups}
    found = dict.fromkeys(centering for _, centering in by_switches)
    centerings = [c for c in ("logit", "probability", "sinkhorn") if c in found]
    paper = paper_ablation()
    printed = [c for c in centerings if ("none", c) in paper]
    header = ["normalization", *centerings, *[f"paper, ImageNet: {c}" for c in printed]]
    rows = []
    for normalization in NORMALIZATIONS:
        if not any((normalization, c) in by_switches for c in centerings):
            continue
        row = [normalization]
        row += [_cell(by_switches.get((normalization, c)), metric) for c in centerings]
        row += [f"{paper[normalization, c].mean:.2f}" for c in printed]
        rows.append(row)
    return Table(header, rows)


def comparison_table(groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    """One row per group, one column per metric, unique prototypes, and the number of seeds."""
    counts = [group.unique_prototypes for group in groups]
    counted = any(counts)  # not where nothing has prototypes
    rows = [
        [
            group.name,
            *[_cell(group, metric) for metric in metrics],
            *([with_spread(unique, 0)] if counted else []),
            str(len(group.runs)),
        ]
        for group, unique in zip(groups, counts, strict=True)
    ]
    unique_header = ["unique prototypes"] if counted else []
    return Table(["", *map(metric_name, metrics), *unique_header, "seeds"], rows)


def paper_table(groups: Sequence[Group], architecture: str = "vit_small/16") -> Table | None:
    """The paper's ImageNet numbers of the methods that are compared; None if it has none of them."""
    methods = [method_label({"method": group.runs[0]["method"]}, "") for group in groups]
    chosen = [row for row in paper_rows(architecture) if row.method in methods]
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
    name = f"paper, ImageNet, {chosen[0].architecture}"
    return Table([name, "kNN", "linear [C]", "linear [D]", *settings], rows)


def utilization_table(groups: Sequence[Group]) -> Table | None:
    """Table 4's numbers (cosine above 0.9 or the threshold nearest to it) and concentrations."""
    rows = []
    for group in groups:
        found: list[dict[str, Any]] = [r["prototypes"] for r in group.whole if r["prototypes"]]
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
                with_spread([p["drift"]["data_cosine_median"] for p in found if "drift" in p], 2),
            ]
        )
    header = ["", "unique prototypes", "largest duplicate set", "runs with a void set"]
    header += ["used (perplexity)", "κ 5 %", "κ median", "κ 95 %", "median cosine with mean y"]
    return Table(header, rows) if rows else None


def runs_table(groups: Sequence[Group], metric: str) -> Table:
    """Every run, the collapsed ones too: accuracy, what it learnt, and how it ended."""
    rows = []
    for group in groups:
        for run in group.runs:
            found = learnt(run)
            nats, *shares = found.values()
            value = run["metrics"].get(metric)
            shown = "–" if value is None else f"{value:.1f}"
            rows.append(
                [group.name, str(run["seed"]), shown, nats,
                 *["–" if share is None else f"{share:.1%}" for share in shares], run["outcome"]]
            )  # fmt: skip
    header = ["run", "seed", metric_name(metric), "I, nats", "I / log K", "student's share"]
    return Table([*header, "loss / log K", "outcome"], rows)


def collapsed_sentences(groups: Sequence[Group]) -> list[str]:
    """One sentence for every group that has nothing to compare."""
    return [
        f"{group.name} is not compared: "
        + ", ".join(f"{n} of {len(group.runs)} runs {outcome}" for outcome, n in counts.items())
        + "."
        for group, counts in ((group, Counter(group.broken)) for group in groups)
        if not group.whole
    ]


def difference_sentences(groups: Sequence[Group], metric: str, baseline: Group) -> list[str]:
    """Every group against the baseline; groups without a value are left out."""
    floor = baseline.by_seed(metric)
    return [
        describe_difference(group.name, group.by_seed(metric), baseline.name, floor)
        for group in groups
        if group is not baseline and group.values(metric) and floor
    ]


def breaking_points(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Per candidate: learning rates tried, the lowest at which a run broke, and how.

    Args:
        groups: with a learning rate each.

    Returns:
        ``{label: {"lrs": [...], "breaks_at": lr or None, "outcomes": {outcome: runs}, "seeds": n,
        "highest_whole": lr or None}}``; ``outcomes`` are those at ``breaks_at``, and ``highest_whole``
        is the highest rate below it (or of all) at which every run trained.
    """
    found: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(group.label for group in groups):
        mine = sorted((g for g in groups if g.label == label), key=lambda g: g.lr or 0.0)
        broken = next((g for g in mine if g.broken), None)
        whole = [g.lr for g in mine[: mine.index(broken) if broken else None]]
        found[label] = {
            "lrs": [g.lr for g in mine],
            "breaks_at": broken.lr if broken else None,
            "outcomes": dict(Counter(broken.broken)) if broken else {},
            "seeds": len(broken.runs) if broken else max(len(g.runs) for g in mine),
            "highest_whole": whole[-1] if whole else None,
        }
    return found


def stability_table(groups: Sequence[Group], metric: str) -> Table:
    """Candidates by learning rates, ``mean ± std`` and how many runs broke."""
    rates = sorted({group.lr for group in groups if group.lr is not None})
    by_key = {(group.label, group.lr): group for group in groups}
    rows = []
    for label in dict.fromkeys(group.label for group in groups):
        row = [label]
        for rate in rates:
            group = by_key.get((label, rate))
            if group is None:
                row.append("–")
                continue
            counts = Counter(group.broken)
            told = [f"{n} of {len(group.runs)} {outcome}" for outcome, n in counts.items()]
            values = group.values(metric)
            row.append("; ".join([*([with_spread(values)] if values else []), *told]))
        rows.append(row)
    return Table(["", *[f"lr {rate:g}" for rate in rates]], rows)


def stability_sentences(groups: Sequence[Group]) -> list[str]:
    """One sentence per candidate."""
    sentences = []
    for label, found in breaking_points(groups).items():
        if found["breaks_at"] is None:
            sentences.append(
                f"{label} did not break at any learning rate tried, up to {max(found['lrs']):g} "
                f"({found['seeds']} seeds)."
            )
            continue
        how = ", ".join(f"{n} {outcome}" for outcome, n in found["outcomes"].items())
        before = found["highest_whole"]
        told = (
            "at the lowest rate tried" if before is None else f"all runs trained up to {before:g}"
        )
        sentences.append(
            f"{label} breaks at learning rate {found['breaks_at']:g} ({how} of {found['seeds']} seeds); "
            f"{told}."
        )
    return sentences
