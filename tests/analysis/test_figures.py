"""The curves that are drawn, not only that something is drawn."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pytest
from scipy import integrate, special

from dinovmf_plugin.analysis import figures
from dinovmf_plugin.core.vmf import exact_log_normalizer
from dinovmf_plugin.mixture.precision import PercentileBin
from dinovmf_plugin.report.theme import THEMES, themed


def lines(figure, axes=0):
    return {line.get_label(): line.get_xydata() for line in figure.axes[axes].lines}


def test_normalizer_figures__differ_by_the_error():
    kappa, value = lines(figures.normalizer_figure((256,)))["p = 256"].T
    again, error = lines(figures.normalizer_error_figure((256,)))["p = 256"].T
    assert (kappa[0], kappa[-1]) == (20, 500)
    assert np.array_equal(kappa, again)
    np.testing.assert_allclose(value - error, exact_log_normalizer(kappa, 256), atol=1e-9)
    assert 0 < error.min() <= error.max() < 1e-3
    better = lines(figures.normalizer_error_figure((256,), order=2))["p = 256"][:, 1]
    assert np.abs(better).max() < 1e-7


@pytest.mark.parametrize("kappa", [10.0, 3.0])
def test_circle__distance_from_it_is_the_density(kappa):
    curve = lines(figures.circle_figure((10.0, 3.0), degrees=315))[f"κ = {kappa:g}"]
    angle = np.arctan2(curve[:, 1], curve[:, 0])
    density = np.hypot(*curve.T) - 1
    expected = np.exp(kappa * np.cos(angle - math.radians(315))) / (
        2 * math.pi * special.iv(0, kappa)
    )
    np.testing.assert_allclose(density, expected, atol=1e-6)
    assert integrate.trapezoid(density, np.linspace(0, 2 * math.pi, 721)) == pytest.approx(
        1, abs=1e-4
    )
    assert math.degrees(angle[density.argmax()]) % 360 == pytest.approx(315, abs=0.5)


def test_utilization_and_precision__show_their_numbers():
    sweep = {0.5: {"unique": 3, "largest": 9}, 0.9: {"unique": 7, "largest": 4}}
    figure = figures.utilization_figure({"DINO": sweep, "DINO-vMF": sweep})
    assert lines(figure, 0)["DINO"].tolist() == [[0.5, 3], [0.9, 7]]
    assert lines(figure, 1)["DINO-vMF"].tolist() == [[0.5, 9], [0.9, 4]]
    bins = [PercentileBin(0, 50, 1, 2, 5, 40.0), PercentileBin(50, 100, 2, 3, 5, 80.0)]
    assert lines(figures.precision_figure({"x": bins}))["x"].tolist() == [[25, 40], [75, 80]]


@pytest.mark.parametrize("kappa", [np.full(50, 14.3), np.linspace(1, 60, 50)])
def test_histograms__hold_every_component_and_image(kappa):
    hits = np.arange(50) % 4
    figure = figures.concentration_figure(kappa, hits)
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert [sum(group) for group in heights] == [50, (hits > 0).sum()]
    assert figure.axes[1].lines[0].get_ydata().sum() == hits.sum()


def test_themes__have_contrast_and_differ():
    def luminance(color):
        channels = np.array(mpl.colors.to_rgb(color))
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for name, page in (("light", "#ffffff"), ("dark", "#16181d")):
        theme = THEMES[name]
        colors = [*theme["axes.prop_cycle"].by_key()["color"], theme["text.color"]]
        for color in colors:
            high, low = sorted((luminance(color), luminance(page)), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 3, (name, color)
    values = {"train": np.arange(20.0), "val": np.arange(5.0)}
    drawn = themed(lambda: figures.likelihood_figure(values, 3.0))
    assert drawn["light"] != drawn["dark"]
    assert all(svg.lstrip().startswith(b"<?xml") for svg in drawn.values())
    assert drawn == themed(lambda: figures.likelihood_figure(values, 3.0))
