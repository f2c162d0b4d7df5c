"""The one chart that tells whether a run learns: what targets and student say about the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dinovmf_plugin.report.theme import axes_figure, legend_above, themed

__all__ = ["LEARNING_NOTE", "learning_chart", "learning_figure"]

HEALTHY = 0.1
LEARNING_NOTE = (
    "What the targets say about the image: I = H(mean target) - mean H(target), as a share of log K "
    "(solid), and what the student says of it, I minus the mean KL divergence (dashed). Above a tenth of "
    "log K (shaded) a run learns; below 3 % (dotted) targets are the same for all images, and methods "
    "cannot differ."
)


def learning_figure(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], least: float = 0.03, compact: bool = False
) -> Figure:
    """Information in targets (solid) and student (dashed) over the steps, the healthy band shaded.

    Args:
        runs: name to records of the monitor (``step``, ``target_information_share``,
            ``student_information_share``; records without them are left out).
        least: share of log K below which the alarm counts.
        compact: smaller, to stand beside others.
    """
    size = (5.2, 3.3) if compact else (6.4, 3.6)
    figure, axes = axes_figure("step", "information (share of log K)", size)
    colors = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    top = 0.3
    for number, (name, records) in enumerate(runs.items()):
        known = [r for r in records if r.get("target_information_share") is not None]
        steps = [r["step"] for r in known]
        shares = [r["target_information_share"] for r in known]
        color = colors[number % len(colors)]
        axes.plot(steps, shares, color=color, label=name)
        student = [r.get("student_information_share") for r in known]
        pairs = [(step, s) for step, s in zip(steps, student, strict=True) if s is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "--", color=color, linewidth=1.1)
        top = max([top, *shares])
    axes.set_ylim(-0.03, min(1.0, 1.15 * top))
    axes.axhspan(HEALTHY, 1.0, color=colors[2], alpha=0.1, linewidth=0)
    axes.axhline(least, linestyle=":", color=colors[1], linewidth=1.1)
    axes.text(0.99, least, "alarm ", ha="right", va="bottom", fontsize=8,
              transform=axes.get_yaxis_transform())  # fmt: skip
    legend_above(figure, axes)
    return figure


def learning_chart(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], least: float = 0.03, compact: bool = False
) -> dict[str, bytes] | None:
    """``learning_figure`` in both themes; None if no record says how much was learnt.

    Example:
        >>> learning_chart({"old": [{"step": 1, "kl": 0.1}]}) is None
        True
    """
    if not any(
        r.get("target_information_share") is not None for records in runs.values() for r in records
    ):
        return None
    return themed(lambda: learning_figure(runs, least, compact))
