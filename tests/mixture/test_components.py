"""Components that follow a stream: docs/em.md, equation by equation, and data that drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vmf import mean_resultant_length
from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.components import (
    OnlineComponents,
    pooled_concentrations,
    relative_magnitudes,
    smoothed_log_weights,
)
from dinovmf_plugin.mixture.model import VMFMixture


def layer_of(directions: torch.Tensor) -> Prototypes:
    layer = Prototypes(directions.shape[1], len(directions), "vmf").requires_grad_(False)
    layer.weight_v.copy_(directions)
    return layer


def draws(mean: np.ndarray, kappa: float, rows: int, rng: np.random.Generator) -> torch.Tensor:
    found = stats.vonmises_fisher(mean / np.linalg.norm(mean), kappa).rvs(rows, random_state=rng)
    return torch.from_numpy(found).float()


# ---- the equations -----------------------------------------------------------------------------------


def test_power_of_a_density__is_a_temperature():
    """Eq. 3: with g = c kappa, the layer at temperature tau is the mixture at power b = c / tau."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(4, 8), dim=1)
    kappa = torch.tensor([20.0, 40.0, 60.0, 80.0])
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = layer_of(directions)
    layer.weight_g.copy_(relative_magnitudes(kappa, counts).unsqueeze(1))
    mean = float((counts * kappa).sum() / counts.sum())
    y = F.normalize(torch.randn(50, 8), dim=1)
    for tau in (0.04, 0.1, 1 / mean):
        power = 1 / (tau * mean)
        at_power = VMFMixture(directions, power * kappa, torch.zeros(4)).responsibilities(y)
        # the layer's normalizer is an expansion: 8 dimensions need its second order
        layer.order = 2
        torch.testing.assert_close(layer(y, tau).softmax(-1), at_power, atol=1e-3, rtol=0)
    # the temperature 1 / mean kappa is the data's mixture itself
    assert power == pytest.approx(1)


def test_relative_magnitudes__are_one_on_average_whatever_the_scale():
    counts, kappa = torch.tensor([5.0, 0.0, 3.0]), torch.tensor([10.0, 70.0, 30.0])
    magnitudes = relative_magnitudes(kappa, counts)
    assert float((counts * magnitudes).sum() / counts.sum()) == pytest.approx(1)
    torch.testing.assert_close(relative_magnitudes(17 * kappa, counts), magnitudes)


@pytest.mark.parametrize("dim", [8, 256])
def test_pooled_concentrations__few_rows_are_drawn_to_all_rows(dim):
    kappa = torch.tensor([50.0, 100.0]).double()
    length = mean_resultant_length(kappa, dim)
    counts = torch.tensor([1e6, 1e6]).double()
    sums = F.one_hot(torch.arange(2), dim).double() * (counts * length).unsqueeze(1)
    np.testing.assert_allclose(pooled_concentrations(counts, sums), kappa, rtol=0.02)
    # one row has length 1 and would be infinitely concentrated
    alone = torch.cat([sums, F.one_hot(torch.tensor([2]), dim).double()])
    found = pooled_concentrations(torch.cat([counts, torch.ones(1).double()]), alone)
    pooled = float((alone.norm(dim=1).sum()) / (2e6 + 1))
    expected = (1 + 4 * pooled) / 5
    assert float(mean_resultant_length(found[2], dim)) == pytest.approx(expected, rel=0.01)


def test_smoothed_log_weights__sum_to_one():
    usage = torch.tensor([0.7, 0.3, 0.0])
    weights = smoothed_log_weights(usage, 97.0).exp()
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[2]) == pytest.approx(0.01)


# ---- the E step --------------------------------------------------------------------------------------


def test_observe__first_batch__by_cosine():
    layer = layer_of(torch.eye(3, 5))
    y = F.normalize(
        torch.tensor([[1.0, 0.1, 0, 0, 0], [0.2, 1, 0, 0, 0], [0.1, 0.9, 0, 0, 0]]), dim=1
    )
    found = OnlineComponents(3, 5, 10.0).observe(y, layer)
    assert found.counts.tolist() == [1, 2, 0]
    torch.testing.assert_close(found.sums[1], y[1:].sum(dim=0))


def test_observe__later__is_the_posterior_of_the_datas_mixture():
    torch.manual_seed(1)
    layer = layer_of(F.normalize(torch.randn(4, 16), dim=1))
    components = OnlineComponents(4, 16, 50.0)
    y = F.normalize(torch.randn(200, 16) + 3 * layer.directions()[torch.arange(200) % 3], dim=1)
    components.move(components.observe(y, layer), [layer])
    mixture = VMFMixture(
        layer.directions(),
        pooled_concentrations(components.counts, components.sums),
        smoothed_log_weights(components.usage, components.rows),
    )
    expected = mixture.responsibilities(y)
    found = components.observe(y, layer)
    torch.testing.assert_close(found.counts, expected.sum(dim=0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.sums, expected.T @ y, rtol=1e-3, atol=1e-3)


def test_move__writes_every_layer_and_keeps_who_got_nothing():
    layers = [layer_of(torch.eye(3, 5)) for _ in range(2)]
    components = OnlineComponents(3, 5, 10.0)
    y = F.normalize(
        torch.tensor([[1.0, 0.5, 0, 0, 0], [1.0, -0.3, 0, 0, 0], [0, 1.0, 0.2, 0, 0]]), dim=1
    )
    components.move(components.observe(y, layers[0]), layers)
    for layer in layers:
        torch.testing.assert_close(layer.directions()[0], F.normalize(y[:2].sum(dim=0), dim=0))
        torch.testing.assert_close(layer.directions()[2], torch.eye(3, 5)[2])
    torch.testing.assert_close(layers[0].weight_g, layers[1].weight_g)


def test_half_precision__the_statistics_stay_float32():
    components = OnlineComponents(3, 5, 10.0).bfloat16()
    assert all(value.dtype == torch.float32 for value in components.buffers())


# ---- streams -----------------------------------------------------------------------------------------


def test_stream__drift__components_follow():
    """Three components turn by 60 degrees; each is at most a few degrees behind."""
    rng = np.random.default_rng(0)
    layer = layer_of(torch.eye(3, 16))
    components = OnlineComponents(3, 16, 200.0)
    behind = []
    for angle in np.linspace(0, math.pi / 3, 60):
        means = np.zeros((3, 16))
        means[np.arange(3), np.arange(3)] = math.cos(angle)
        means[np.arange(3), np.arange(3) + 3] = math.sin(angle)
        y = torch.cat([draws(means[k], (60.0, 120.0, 240.0)[k], 40, rng) for k in range(3)])
        components.move(components.observe(y, layer), [layer])
        cosine = (layer.directions() * torch.from_numpy(means).float()).sum(dim=1)
        behind.append(float(torch.rad2deg(torch.arccos(cosine.clamp(max=1)).max())))
    # with a memory of 200 rows, 40 a step: 5 steps, that is 5 degrees
    assert max(behind[10:]) < 9
    kappa = pooled_concentrations(components.counts, components.sums)
    assert kappa.argsort().tolist() == [0, 1, 2]
    np.testing.assert_allclose(kappa, [60, 120, 240], rtol=0.2)
    torch.testing.assert_close(
        layer.weight_g.squeeze(1), relative_magnitudes(kappa, components.counts)
    )


def test_stream__a_component_out_of_use__waits_and_returns():
    """For 100 steps nothing comes for one component; it is still there when its rows return."""
    rng = np.random.default_rng(1)
    layer = layer_of(torch.eye(2, 16))
    components = OnlineComponents(2, 16, 100.0)
    means = np.eye(16)[:2]
    for _ in range(5):
        y = torch.cat([draws(m, 80.0, 30, rng) for m in means])
        components.move(components.observe(y, layer), [layer])
    kept, usage = components.sums[1].clone(), []
    for _ in range(100):
        components.move(components.observe(draws(means[0], 80.0, 60, rng), layer), [layer])
        usage.append(float(components.usage[1]))
    torch.testing.assert_close(components.sums[1], kept, rtol=1e-3, atol=1e-3)
    assert usage[-1] < 1e-3
    assert usage[0] > 0.2
    for _ in range(20):
        components.move(components.observe(draws(means[1], 80.0, 60, rng), layer), [layer])
    assert float(components.usage[1]) > 0.9
    assert float(layer.directions()[1, 1]) > 0.99


def test_stream__stationary__is_the_mixtures_maximum():
    rng = np.random.default_rng(2)
    means = np.eye(16)[:3]
    kappas = (40.0, 80.0, 160.0)
    layer = layer_of(F.normalize(torch.eye(3, 16) + 0.3 * torch.randn(3, 16), dim=1))
    components = OnlineComponents(3, 16, 4000.0)
    for _ in range(100):
        y = torch.cat([draws(means[k], kappas[k], 20 * (k + 1), rng) for k in range(3)])
        statistics = components.observe(y, layer)
        components.move(statistics, [layer])
    found = components.parameters_of(layer)
    assert float(found.directions.diagonal().min()) > 0.999
    np.testing.assert_allclose(found.concentrations, kappas, rtol=0.06)
    np.testing.assert_allclose(found.log_weights.exp(), [1 / 6, 2 / 6, 3 / 6], atol=0.02)
    joint = em.log_joint(y.double(), em.Parameters(*(v.double() for v in vars(found).values())))
    expected = float(joint.logsumexp(dim=1).mean())
    assert float(statistics.log_likelihood) / len(y) == pytest.approx(expected, abs=0.1)
