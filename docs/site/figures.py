"""Draw the figures of docs/mathematics.md from the code: ``python docs/site/figures.py [FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core.centering import make_centering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import exact_log_normalizer, log_normalizer, mean_resultant_length
from dinovmf_plugin.report.theme import THEMES, axes_figure, legend_above

PICTURES = Path(__file__).parents[1] / "pictures"
DIM = 256  # of the paper
SIZE = (5.6, 3.3)


def normalizer() -> Figure:
    """D(kappa) by the expansion (lines) and exact (dots)."""
    figure, axes = axes_figure("concentration κ", "D(κ) in nats", SIZE)
    kappa = torch.linspace(0, 300, 301, dtype=torch.float64)
    for dim in (64, 128, 256, 512):
        axes.plot(kappa, log_normalizer(kappa, dim), label=f"p = {dim}")
        axes.plot(kappa[::25], exact_log_normalizer(kappa[::25], dim), "k.", markersize=5)
    axes.plot([], [], "k.", label="exact")
    axes.legend()
    return figure


def expansion_error(kappa: Tensor, order: int) -> np.ndarray:
    """Expansion minus exact value of D at p = 256, in nats."""
    return log_normalizer(kappa, DIM, order=order).numpy() - exact_log_normalizer(kappa, DIM)


def normalizer_error() -> Figure:
    """The expansion's error by order."""
    figure, axes = axes_figure("concentration κ", "error of D(κ) in nats", SIZE)
    kappa = torch.logspace(0, 3, 200, dtype=torch.float64)
    for order in (0, 1, 2):
        name = "order 0 (the paper's)" if order == 0 else f"order {order}"
        axes.loglog(kappa, np.abs(expansion_error(kappa, order)), label=name)
    axes.set_ylim(1e-12, 1e-1)
    axes.legend(ncols=3, fontsize=8, loc="upper center")
    return figure


def component_score(cosine: float, kappa: Tensor) -> Tensor:
    """``kappa <mu, y> + D(kappa)`` of an embedding at this cosine to the prototype, p = 256."""
    return kappa * cosine + log_normalizer(kappa, DIM)


def concentration() -> Figure:
    """The logit of one component over its concentration, with and without D."""
    figure, axes = axes_figure("concentration κ", "logit of the component", SIZE)
    kappa = torch.linspace(0, 120, 241, dtype=torch.float64)
    for cosine in (0.1, 0.2, 0.3, 0.5):
        score = component_score(cosine, kappa)
        (line,) = axes.plot(kappa, score, label=f"⟨μ, y⟩ = {cosine:g}")
        axes.plot(kappa, kappa * cosine, ":", color=line.get_color(), linewidth=1.1)
        best = int(score.argmax())
        if best < len(kappa) - 1:
            axes.plot(kappa[best], score[best], "o", color=line.get_color())
    axes.plot([], [], ":", color=mpl.rcParams["text.color"], label="without D")
    axes.set_ylim(-22, 30)
    axes.legend(fontsize=8)
    return figure


def expected_cosine() -> Figure:
    """A_p(kappa), the mean cosine of a component's embeddings to its direction."""
    figure, axes = axes_figure("concentration κ", "expected cosine A$_p$(κ)", SIZE)
    kappa = torch.linspace(0, 300, 301, dtype=torch.float64)
    for dim in (64, 256):
        axes.plot(kappa, mean_resultant_length(kappa, dim), label=f"p = {dim}")
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def centered_usage(
    name: str, components: int = 32, dim: int = 64, rows: int = 512, steps: int = 60, seed: int = 0
) -> Tensor:
    """Mean target of each component after the center has settled, largest first.

    Embeddings are drawn around the prototypes, around the first ones more often (in proportion to
    ``1 / (k + 1)``) and around all with the same spread. The prototypes stay as they are.

    Args:
        name: of the centering, or ``none``.
        components: K.
        dim: of the embeddings.
        rows: embeddings a step.
        steps: moves of the center.
        seed: of everything that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    layer, temperature = Prototypes(dim, components, "vmf"), 0.07
    with torch.no_grad():
        layer.weight_v.copy_(torch.randn(components, dim, generator=generator))
        norms = torch.linspace(0.6, 1.4, components)
        layer.weight_g.copy_(norms[torch.randperm(components, generator=generator), None])
    weights = 1 / torch.arange(1, components + 1)
    centering = make_centering("logit" if name == "logit" else "probability", components)
    bias = layer.log_normalizer(temperature)
    targets = torch.empty(0)
    for _ in range(steps):
        chosen = torch.multinomial(weights, rows, replacement=True, generator=generator)
        noise = torch.randn(rows, dim, generator=generator) / dim**0.5
        scores = layer.scores(F.normalize(0.5 * layer.directions()[chosen] + noise, dim=-1))
        targets = centering(scores, temperature, bias)
        if name != "none":
            centering.update(scores, temperature, bias)
    return targets.mean(dim=0).sort(descending=True).values


def centering() -> Figure:
    """Mean target per component without a center, with one of logits, with one of probabilities."""
    figure, axes = axes_figure("components, by usage", "mean target times K", SIZE)
    for name in ("none", "logit", "probability"):
        usage = torch.stack([centered_usage(name, seed=seed) for seed in range(8)]).mean(dim=0)
        axes.plot(np.arange(1, len(usage) + 1), usage * len(usage), label=name)
    axes.axhline(1, color=mpl.rcParams["axes.edgecolor"], linestyle=":")
    axes.set_yscale("log", base=2)
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    legend_above(figure, axes)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "normalizer": normalizer,
    "normalizer_error": normalizer_error,
    "concentration": concentration,
    "expected_cosine": expected_cosine,
    "centering": centering,
}


def draw(folder: Path) -> None:
    """Write every figure as SVG on white, which is read on light and dark pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FIGURES.items():
        with mpl.rc_context(THEMES["light"]):
            make().savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
