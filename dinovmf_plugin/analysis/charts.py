"""The charts of one analysis, each for a light and a dark page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dinovmf_plugin.analysis import figures
from dinovmf_plugin.features.network import Network
from dinovmf_plugin.mixture.model import log_uniform_density
from dinovmf_plugin.mixture.precision import PercentileBin
from dinovmf_plugin.report.learning import learning_chart
from dinovmf_plugin.report.theme import themed
from dinovmf_plugin.training.alarms import LEAST_SHARE
from dinovmf_plugin.training.curve import read_monitor

__all__ = ["analysis_charts", "monitored"]


def monitored(models: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the monitors wrote beside the checkpoints (or beside ``previous/``)."""
    found = {}
    for name, result in models.items():
        folder = Path(result["checkpoint"]).parent
        folder = folder.parent if folder.name == "previous" else folder
        found[name] = read_monitor(folder)["step"]
    return found


def analysis_charts(
    result: Mapping[str, Any], model: Network, hits: Tensor, likelihoods: Mapping[str, Tensor]
) -> dict[str, dict[str, bytes]]:
    """Every chart that the results allow.

    Args:
        result: of the analysis, the compared models in it.
        model: the analyzed one.
        hits: images that each of its prototypes wins ``(K,)``.
        likelihoods: log-likelihoods of the images by set.

    Returns:
        SVG by chart and theme.
    """
    models = {result["name"]: result, **result["comparison"]}
    sweeps = {
        name: {float(t): count for t, count in found["utilization"]["greedy"].items()}
        for name, found in models.items()
    }
    bins = {
        name: [PercentileBin(**part) for part in found["precision"]["bins"]]
        for name, found in models.items()
        if "bins" in found["precision"]
    }
    kappa = model.prototypes.concentration(model.mixture_head[1].teacher_temperature)
    draw: dict[str, Callable[[], Figure]] = {
        "utilization": partial(figures.utilization_figure, sweeps),
        "concentration": partial(
            figures.concentration_figure, kappa.detach().cpu().numpy(), hits.numpy()
        ),
        "likelihood": partial(
            figures.likelihood_figure,
            {name: value.numpy() for name, value in likelihoods.items()},
            log_uniform_density(model.prototypes.dim),
        ),
        "circle": figures.circle_figure,
        "normalizer": partial(figures.normalizer_figure, order=model.prototypes.order),
        "normalizer_error": partial(figures.normalizer_error_figure, order=model.prototypes.order),
    }
    if bins:
        draw["precision"] = partial(figures.precision_figure, bins)
    drawn = {name: themed(function) for name, function in draw.items()}
    learning = learning_chart(monitored(models), LEAST_SHARE)
    return drawn if learning is None else {**drawn, "learning": learning}
