"""One look for every chart: two themes, and figures that share their axes and legend.

Draw inside ``themed`` (or ``matplotlib.rc_context(THEMES["light"])``): colors are those of the context.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["THEMES", "axes_figure", "data_uri", "legend_above", "themed"]


def _theme(text: str, faint: str, colors: Sequence[str]) -> dict[str, Any]:
    return {
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": faint,
        "axes.prop_cycle": cycler(color=colors),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": faint,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "xtick.color": text,
        "ytick.color": text,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "font.size": 10,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "dinovmf_plugin",  # the same figure gives the same file
    }


THEMES: dict[str, dict[str, Any]] = {
    "light": _theme(
        "#24292f", "#8c959f", ["#1f6feb", "#d1462f", "#1a7f4b", "#9a6700", "#8250df", "#57606a"]
    ),
    "dark": _theme(
        "#dde3ea", "#7d8590", ["#6cb0ff", "#ff8a75", "#5fd08d", "#e3b341", "#c297ff", "#9aa5b1"]
    ),
}
SIZE = (6.4, 3.6)


def themed(draw: Callable[[], Figure]) -> dict[str, bytes]:
    """Draw a figure once per theme, as SVG with a transparent background.

    Args:
        draw: makes the figure; called inside each theme's ``rc_context``.

    Returns:
        ``{"light": svg, "dark": svg}``.

    Example:
        >>> sorted(themed(lambda: axes_figure("k", "accuracy")[0]))
        ['dark', 'light']
    """
    out = {}
    for name, theme in THEMES.items():
        with mpl.rc_context(theme):  # type: ignore[arg-type]
            buffer = io.BytesIO()
            draw().savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
            out[name] = buffer.getvalue()
    return out


def data_uri(content: bytes, kind: str) -> str:
    """Content as a ``data:`` URI, e.g. for ``image/svg+xml``.

    Example:
        >>> data_uri(b"abc", "image/png")
        'data:image/png;base64,YWJj'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def axes_figure(xlabel: str, ylabel: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one pair of labeled axes; ``size`` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def legend_above(figure: Figure, axes: Axes) -> None:
    """Above the axes, so that it never covers a curve; none for a single unnamed model."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(handles)))
