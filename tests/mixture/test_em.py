"""The pure functions of EM against their definitions, written out."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from numpy.random import RandomState
from torch.nn import functional as F

from dinovmf_plugin.core.vmf import mean_resultant_length
from dinovmf_plugin.mixture import em
from dinovmf_plugin.mixture.concentration import (
    banerjee_concentration,
    invert_mean_resultant_length,
)
from dinovmf_plugin.mixture.fitting import UnitRows
from dinovmf_plugin.mixture.initialization import (
    kmeans_plusplus_directions,
    merge_directions,
    seed_rows,
    spherical_kmeans,
)
from dinovmf_plugin.mixture.online import remember


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def some_parameters(num: int, dim: int) -> em.Parameters:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(num, generator=generator, dtype=torch.float64).log_softmax(0)
    return em.Parameters(unit(num, dim, 2), torch.linspace(0, 30, num).double(), weights)


# ---- concentrations --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 16, 256, 2048])
def test_inversion__round_trip(dim):
    kappa = torch.logspace(-6, 4.9, 60, dtype=torch.float64)
    found = invert_mean_resultant_length(mean_resultant_length(kappa, dim), dim)
    np.testing.assert_allclose(found, kappa, rtol=1e-6)


@pytest.mark.parametrize(("dim", "kappa"), [(3, 5.0), (16, 0.01), (256, 100.0), (256, 5000.0)])
def test_inversion__against_mpmath(dim, kappa):
    nu = mpmath.mpf(dim) / 2 - 1
    length = mpmath.besseli(nu + 1, kappa) / mpmath.besseli(nu, kappa)
    found = invert_mean_resultant_length(torch.tensor(float(length), dtype=torch.float64), dim)
    assert float(found) == pytest.approx(kappa, rel=1e-9)


def test_inversion__ends__zero_and_the_bound():
    lengths = torch.tensor([0.0, 1.0, 1.0 + 1e-12])
    found = invert_mean_resultant_length(lengths, 8, maximum=700.0)
    assert found.tolist() == [0.0, 700.0, 700.0]
    mixed = invert_mean_resultant_length(torch.tensor([0.0, 0.5, 1.0]), 8, maximum=700.0)
    assert mixed[0] == 0
    assert mixed[2] == 700
    assert float(mean_resultant_length(mixed[1], 8)) == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [-0.1, math.nan])
def test_inversion__no_length__refused(wrong):
    with pytest.raises(ValueError, match="negative or NaN"):
        invert_mean_resultant_length(torch.tensor([0.5, wrong]), 8)


def test_banerjee__is_near():
    kappa = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    found = banerjee_concentration(mean_resultant_length(kappa, 256), 256)
    np.testing.assert_allclose(found, kappa, rtol=0.01)


# ---- E and M steps ---------------------------------------------------------------------------------


def test_e_step__is_bayes_rule_row_by_row():
    parameters, x = some_parameters(4, 5), unit(7, 5)
    expected = np.zeros((7, 4))
    for n in range(7):
        for k in range(4):
            kappa = float(parameters.concentrations[k])
            # C_5(kappa) / C_5(0), from the definition: nu = 3 / 2
            ratio = (
                1.0
                if kappa == 0
                else float(
                    mpmath.mpf(kappa) ** 1.5
                    / (2**1.5 * mpmath.gamma(2.5) * mpmath.besseli(1.5, kappa))
                )
            )
            weight = math.exp(parameters.log_weights[k])
            cosine = float(x[n] @ parameters.directions[k])
            expected[n, k] = weight * ratio * math.exp(kappa * cosine)
    joint = em.log_joint(x, parameters)
    np.testing.assert_allclose(joint.exp(), expected, rtol=1e-10)
    found = em.sufficient_statistics([x], parameters)
    responsibilities = expected / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.counts, responsibilities.sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.sums, responsibilities.T @ x.numpy(), atol=1e-10)
    assert float(found.log_likelihood) == pytest.approx(np.log(expected.sum(axis=1)).sum())
    assert found.rows == 7


@pytest.mark.parametrize("size", [1, 3, 50])
def test_statistics__of_chunks_add_up(size):
    parameters, x = some_parameters(4, 5), unit(50, 5)
    whole = em.sufficient_statistics([x], parameters)
    parts = em.sufficient_statistics(x.split(size), parameters)
    joined = em.sufficient_statistics([x[:20]], parameters) + em.sufficient_statistics(
        [x[20:]], parameters
    )
    for other in (parts, joined):
        np.testing.assert_allclose(other.counts, whole.counts, rtol=1e-12)
        np.testing.assert_allclose(other.sums, whole.sums, atol=1e-12)
        assert other.rows == whole.rows


def test_m_step__no_other_parameters_are_better():
    x, start = unit(60, 4), some_parameters(3, 4)
    statistics = em.sufficient_statistics([x], start)
    best = em.maximization(statistics, start.directions)

    def expected_log_likelihood(parameters: em.Parameters) -> float:
        offsets = em.component_offsets(parameters)
        aligned = (statistics.sums * parameters.directions).sum(dim=1)
        return float((statistics.counts * offsets + parameters.concentrations * aligned).sum())

    top = expected_log_likelihood(best)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        noise = [torch.randn(s, generator=generator).double() * 0.02 for s in ((3, 4), (3,), (3,))]
        other = em.Parameters(
            F.normalize(best.directions + noise[0], dim=1),
            best.concentrations * noise[1].exp(),
            (best.log_weights + noise[2]).log_softmax(0),
        )
        assert expected_log_likelihood(other) < top


def test_m_step__component_without_rows__keeps_its_direction():
    x = unit(10, 4)
    directions = torch.cat([x[:1], -x[:1]])
    statistics = em.Statistics(
        torch.tensor([10.0, 0.0]).double(),
        torch.stack([x.sum(dim=0), torch.zeros(4).double()]),
        torch.zeros(()),
        10,
    )
    found = em.maximization(statistics, directions)
    torch.testing.assert_close(found.directions[1], directions[1])
    assert found.concentrations[1] == 0
    assert found.log_weights.exp().tolist() == pytest.approx([1, 0])


def test_float32__close_to_float64():
    parameters, x = some_parameters(6, 16), unit(500, 16)
    one = em.sufficient_statistics([x.float()], parameters)
    two = em.sufficient_statistics([x], parameters)
    assert one.sums.dtype == torch.float64
    np.testing.assert_allclose(one.sums, two.sums, atol=1e-3)
    assert float(one.log_likelihood) == pytest.approx(float(two.log_likelihood), rel=1e-6)


# ---- starts ----------------------------------------------------------------------------------------


def test_seeds__never_twice_the_same_and_far_apart():
    x = F.normalize(torch.eye(8).repeat_interleave(50, 0) + 0.01 * unit(400, 8).float(), dim=1)
    seeds = seed_rows(x, 8, RandomState(0))
    assert len({int(s.argmax()) for s in seeds}) == 8


def test_spherical_kmeans__objective_never_falls():
    x = unit(300, 6)
    directions, last = x[:7], -math.inf
    for _ in range(8):
        directions = spherical_kmeans(x, directions, iterations=1)
        value = float((x @ directions.T).max(dim=1).values.sum())
        assert value >= last - 1e-12
        last = value


def test_merging__narrow_components_inside_a_wide_one():
    # two narrow groups 10 degrees apart and a wide arc of four: cosines alone would join the narrow ones
    narrow = torch.tensor([[1.0, 0.0, 0.0], [math.cos(0.17), math.sin(0.17), 0.0]]).double()
    angles = torch.arange(4).double() * 0.35
    ring = torch.stack([torch.zeros(4).double(), angles.sin(), angles.cos()], dim=1) * -1
    counts = torch.cat([torch.full((2,), 500.0), torch.full((4,), 100.0)]).double()
    lengths = torch.cat([torch.full((2,), 0.999), torch.full((4,), 0.97)]).double()
    sums = torch.cat([narrow, ring]) * (counts * lengths).unsqueeze(1)
    found = merge_directions(counts, sums, 3)
    assert float((found @ narrow.T).max(dim=0).values.min()) > 0.999


@pytest.mark.parametrize("num", [1, 5, 300])
def test_start__unit_directions(num):
    x = unit(700, 8).float()
    found = kmeans_plusplus_directions(x, num, RandomState(0))
    assert found.shape == (num, 8)
    np.testing.assert_allclose(found.norm(dim=1), 1, rtol=1e-6)
    assert len(found.unique(dim=0)) == num


# ---- online ----------------------------------------------------------------------------------------


def batch(counts: list[float], rows: int) -> em.Statistics:
    n = torch.tensor(counts, dtype=torch.float64)
    return em.Statistics(n, n.unsqueeze(1) * torch.eye(2, 3).double(), torch.zeros(()), rows)


def test_remember__one_batch_is_its_rows_one_after_the_other():
    together = remember(remember(None, batch([3, 3], 6), 5.0), batch([4, 0], 4), 5.0)
    alone = remember(None, batch([3, 3], 6), 5.0)
    for _ in range(4):
        alone = remember(alone, batch([1, 0], 1), 5.0)
    torch.testing.assert_close(together.counts, alone.counts)
    torch.testing.assert_close(together.sums, alone.sums)
    torch.testing.assert_close(together.usage, alone.usage)
    # by hand: three rows into nothing, then four more, each forgetting a fifth
    assert float(alone.counts[0]) == pytest.approx(sum(0.8**i for i in range(7)))


def test_remember__unused_component__keeps_everything_but_its_share():
    memory = remember(None, batch([30, 30], 60), 50.0)
    kept = memory.counts[1].clone()
    for _ in range(100):
        memory = remember(memory, batch([60, 0], 60), 50.0)
    assert memory.counts[1] == kept
    assert memory.counts[0] == pytest.approx(50)
    assert memory.usage[1] < 1e-6


def test_remember__forever__is_the_sum():
    memory = remember(remember(None, batch([3, 1], 4), math.inf), batch([2, 4], 6), math.inf)
    assert memory.counts.tolist() == [5, 5]
    assert memory.usage.tolist() == pytest.approx([0.5, 0.5])


def test_remember__follows_a_drift():
    turning = None
    for angle in np.linspace(0, math.pi / 2, 50):
        x = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)
        one = em.Statistics(torch.tensor([20.0]).double(), 20 * x, torch.zeros(()), 20)
        turning = remember(turning, one, 40.0)
    direction = F.normalize(turning.sums, dim=1)[0]
    assert float(direction[1]) > 0.99


@pytest.mark.parametrize("memory", [0.5, math.nan])
def test_remember__no_memory__refused(memory):
    with pytest.raises(ValueError, match="at least 1 row"):
        remember(None, batch([1, 1], 2), memory)


# ---- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_unit_rows__any_layout_read_only(order):
    x = np.array([[3.0, 4.0], [0.0, -2.0], [1e-300, 0.0]], order=order)
    x.setflags(write=False)
    chunks = list(UnitRows(x, chunk=2).chunks(5))
    assert [len(c) for c in chunks] == [2, 1]
    np.testing.assert_allclose(torch.cat(chunks), [[0.6, 0.8], [0, -1], [1, 0]], rtol=1e-15)
