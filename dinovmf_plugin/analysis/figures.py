"""The paper's figures, drawn from the code itself; every function returns a matplotlib ``Figure``.

Draw inside ``report.theme.themed``: colors are those of its context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from dinovmf_plugin.core.vmf import exact_log_normalizer, log_density, log_normalizer
from dinovmf_plugin.mixture.precision import PercentileBin
from dinovmf_plugin.report.theme import axes_figure, legend_above

__all__ = [
    "circle_figure",
    "concentration_figure",
    "likelihood_figure",
    "normalizer_error_figure",
    "normalizer_figure",
    "precision_figure",
    "utilization_figure",
]


def normalizer_figure(
    dims: Sequence[int] = (64, 128, 256, 512), *, order: int = 0, kappa_max: float = 500.0
) -> Figure:
    """Figure 4: the approximated log-normalizer, up to a constant, over kappa in [20, kappa_max].

    ``D(kappa) = log C_p(kappa) - log C_p(0)``, which training adds to the logits.
    """
    figure, axes = axes_figure("concentration κ", "log C$_p$(κ) − log C$_p$(0)")
    kappa = torch.linspace(20.0, kappa_max, 400, dtype=torch.float64)
    for dim in dims:
        axes.plot(kappa, log_normalizer(kappa, dim, order=order), label=f"p = {dim}")
    legend_above(figure, axes)
    return figure


def normalizer_error_figure(
    dims: Sequence[int] = (64, 128, 256, 512), *, order: int = 0, kappa_max: float = 500.0
) -> Figure:
    """Figure 5: approximation minus exact value (``vmf.exact_log_normalizer``), in nats."""
    figure, axes = axes_figure("concentration κ", "error (nats)")
    kappa = torch.linspace(20.0, kappa_max, 400, dtype=torch.float64)
    for dim in dims:
        error = log_normalizer(kappa, dim, order=order).numpy() - exact_log_normalizer(kappa, dim)
        axes.plot(kappa, error, label=f"p = {dim}")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    legend_above(figure, axes)
    return figure


def circle_figure(concentrations: Sequence[float] = (10.0, 3.0), *, degrees: float = 315) -> Figure:
    """Figure 3: vMF densities on the circle around one direction, for several magnitudes.

    The density is the distance from the circle; arrows are the prototypes, as long as their
    concentration. A longer prototype puts its mass closer to its direction.
    """
    figure, axes = axes_figure("", "", (4.2, 4.4))
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    points = torch.stack([angle.cos(), angle.sin()], dim=-1)
    mean = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    axes.fill(*points.T, color=mpl.rcParams["grid.color"], alpha=0.12, linewidth=0)
    axes.plot(*points.T, color=mpl.rcParams["axes.edgecolor"], linewidth=1)
    for kappa in concentrations:
        density = log_density(points, mean, torch.tensor(kappa)).exp()
        (line,) = axes.plot(*((1 + density.unsqueeze(1)) * points).T, label=f"κ = {kappa:g}")
        tip = 0.9 * kappa / max(concentrations) * mean
        axes.annotate(
            "",
            xy=(float(tip[0]), float(tip[1])),
            xytext=(0, 0),
            arrowprops={"arrowstyle": "-|>", "color": line.get_color(), "linewidth": 1.8},
        )
    axes.set_aspect("equal")
    axes.set_axis_off()
    legend_above(figure, axes)
    return figure


def utilization_figure(sweeps: Mapping[str, Mapping[float, Mapping[str, int]]]) -> Figure:
    """Figures 6 and 7: unique prototypes and the largest duplicate set against the threshold.

    Args:
        sweeps: per model, what ``utilization`` returns.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"unique": "unique prototypes", "largest": "largest duplicate set"}
    for i, (key, label) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, i + 1, xlabel="cosine threshold", ylabel=label)
        for name, sweep in sweeps.items():
            values = [counts[key] for counts in sweep.values()]
            axes.plot(list(sweep), values, "o-", markersize=4, label=name)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    legend_above(figure, axes)
    return figure


def precision_figure(series: Mapping[str, Sequence[PercentileBin]]) -> Figure:
    """Figure 2: kNN accuracy by percentile range of the norm of the assigned prototype.

    Args:
        series: per model, what ``accuracy_by_percentile`` returns.
    """
    figure, axes = axes_figure("percentile range of ‖w‖ of the assigned prototype", "kNN top-1 (%)")
    for name, bins in series.items():
        axes.plot(
            [(part.low + part.high) / 2 for part in bins],
            [part.accuracy for part in bins],
            "o-",
            markersize=5,
            label=name,
        )
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    legend_above(figure, axes)
    return figure


def concentration_figure(concentrations: ArrayLike, hits: ArrayLike) -> Figure:
    """Concentrations of all and of used components, and how many images each component wins.

    Args:
        concentrations: ``kappa`` of every component, ``(K,)``.
        hits: images per component, ``(K,)``.
    """
    kappa, wins = np.asarray(concentrations), np.asarray(hits)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot(1, 2, 1, xlabel="concentration κ", ylabel="components")
    if np.ptp(kappa) < 1e-6 * np.abs(kappa).max():
        edges = np.linspace(0.9, 1.1, 41) * float(np.abs(kappa).max() or 1)
    else:
        edges = np.histogram_bin_edges(kappa, bins=40)
    bounds = edges.tolist()
    colors = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    axes.hist(kappa, bounds, color=colors[5], alpha=0.45, label="all components")
    axes.hist(kappa[wins > 0], bounds, color=colors[0], alpha=0.85, label="that win an image")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, axes)
    axes = figure.add_subplot(1, 2, 2, xlabel="components by usage", ylabel="images won")
    used = np.sort(wins[wins > 0])[::-1]
    axes.plot(np.arange(1, len(used) + 1), used)
    axes.set_ylim(bottom=0)
    axes.set_xlim(1, max(2, len(used)))
    return figure


def likelihood_figure(log_likelihoods: Mapping[str, ArrayLike], uniform: float) -> Figure:
    """Distribution of the images' log-likelihoods, with the uniform density as a landmark.

    Args:
        log_likelihoods: per set of images, ``(N,)`` each.
        uniform: ``mixture.log_uniform_density(p)``.
    """
    figure, axes = axes_figure(
        "log p(y) − log-density of the uniform distribution", "share of images"
    )
    values = {name: np.asarray(v) - uniform for name, v in log_likelihoods.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=40).tolist()
    for name, value in values.items():
        axes.hist(
            value,
            edges,
            weights=np.full(len(value), 1 / len(value)),
            histtype="step",
            linewidth=1.8,
            label=f"{name} ({len(value):,} images)",
        )
    if edges[0] <= 0:
        axes.axvline(0, color=mpl.rcParams["axes.edgecolor"], linestyle="--", label="uniform")
    legend_above(figure, axes)
    return figure
