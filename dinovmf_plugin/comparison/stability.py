"""Where each method breaks as the learning rate rises: the spirit of the paper's ViT-Base claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.comparison.statistics import with_spread

__all__ = ["breaking_points", "stability_rows", "stability_sentences"]


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


def stability_rows(groups: Sequence[Group], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: candidates by learning rates, ``mean ± std`` and how many runs broke."""
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
    return ["", *[f"lr {rate:g}" for rate in rates]], rows


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
