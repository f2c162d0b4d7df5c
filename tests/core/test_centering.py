"""Centering against slow float64 numpy over several steps, in half precision, and across two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinovmf_plugin.core.assignments import log_mean_probability, sinkhorn
from dinovmf_plugin.core.centering import (
    CENTERINGS,
    Centering,
    LogitCentering,
    ProbabilityCentering,
    SinkhornCentering,
    make_centering,
)

K = 9
TEMPERATURES = [0.04, 0.055, 0.07]  # the teacher's temperature warms up while the center moves


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _batches(steps: int = 3, rows: int = 6) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(rows, K, generator=generator) * 0.5 for _ in range(steps)]
    return scores, -torch.rand(K, generator=generator) * 5


# the five centerings, the paper's Eqs. 8 and 9: (scores, tau, bias, c) -> (targets, batch center)


def _logit(s, tau, bias, c):
    return _softmax((s - c) / tau), s.mean(0)


def _logit_vmf(s, tau, bias, c):
    logits = s / tau + bias
    return _softmax(logits - c), logits.mean(0)


def _logit_vmf_raw(s, tau, bias, c):
    return _softmax((s - c) / tau + bias), s.mean(0)


def _probability(s, tau, bias, c):
    logits = s / tau
    return _softmax(logits - c), np.log(_softmax(logits).mean(0))


def _probability_vmf(s, tau, bias, c):
    logits = s / tau + bias
    return _softmax(logits - c), np.log(_softmax(logits).mean(0))


CASES = {
    "logit": (lambda: LogitCentering(K, 0.9), False, _logit),
    "logit_vmf": (lambda: LogitCentering(K, 0.9), True, _logit_vmf),
    "logit_vmf_raw": (lambda: LogitCentering(K, 0.9, raw_scores=True), True, _logit_vmf_raw),
    "probability": (lambda: ProbabilityCentering(K, 0.9), False, _probability),
    "probability_vmf": (lambda: ProbabilityCentering(K, 0.9), True, _probability_vmf),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_and_center__three_steps__equal_the_equations(case):
    make, with_bias, equations = CASES[case]
    centering = make()
    scores, bias = _batches()
    c = np.zeros(K)
    moved = []
    for s, tau in zip(scores, TEMPERATURES, strict=True):
        before = s.clone()
        targets = centering(s, tau, bias if with_bias else None)
        expected, batch_center = equations(s.double().numpy(), tau, bias.double().numpy(), c)
        np.testing.assert_allclose(targets.numpy(), expected, rtol=2e-4, atol=1e-7)
        centering.update(s, tau, bias if with_bias else None)
        c = 0.9 * c + 0.1 * batch_center
        np.testing.assert_allclose(centering.center.numpy()[0], c, rtol=1e-5, atol=1e-6)
        assert torch.equal(s, before)  # neither step may touch the scores
        moved.append(np.abs(c).max())
    assert moved[0] > 0.01
    assert not targets.requires_grad
    assert targets.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_update__in_chunks__equals_all_rows(case):
    make, with_bias, _ = CASES[case]
    scores, bias = _batches(rows=7)
    bias = bias if with_bias else None
    whole, chunked = make(), make()
    for s, tau in zip(scores, TEMPERATURES, strict=True):
        whole.update(s, tau, bias)
        chunked.update((part for part in s.split([3, 0, 1, 3])), tau, bias)
        torch.testing.assert_close(chunked.center, whole.center)


def test_update__changes_the_next_targets_not_this_steps():
    scores, _ = _batches()
    for centering in (LogitCentering(K), ProbabilityCentering(K)):
        first = centering(scores[0], 0.07)
        centering.update(scores[0], 0.07)
        assert not torch.allclose(centering(scores[0], 0.07), first, rtol=1e-3)


def test_probability_center__is_a_log_probability_outside_the_temperature():
    scores, _ = _batches()
    centering = ProbabilityCentering(K, momentum=0.0)
    centering.update(scores[0], 0.05)
    torch.testing.assert_close(centering.center.exp().sum(), torch.tensor(1.0))
    # "rich gets poorer" (Eq. 7): dividing by the usage once, whatever the temperature
    targets = centering(scores[1], 0.05)
    expected = (scores[1] / 0.05).softmax(-1) / centering.center.exp()
    torch.testing.assert_close(targets, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", CENTERINGS)
@pytest.mark.parametrize("spread", [300.0, 3000.0])
def test_wide_logits__never_infinite(name, spread):
    """Averaging float32 probabilities underflows to log 0 from about 100 nats on."""
    scores = torch.linspace(0, 1, K).repeat(5, 1) * spread * 0.04
    naive = (scores / 0.04).softmax(-1).mean(0).log()
    assert bool(naive.isinf().any())
    centering = make_centering(name, K, momentum=0.5)
    for _ in range(3):
        targets = centering(scores, 0.04)
        centering.update(scores, 0.04)
        assert bool(centering.center.isfinite().all())
        assert bool(targets.isfinite().all())
        torch.testing.assert_close(targets.sum(-1), torch.ones(5))


def test_log_mean_probability__is_the_arithmetic_mean():
    logits = torch.randn(7, K, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits.double().softmax(-1).mean(0, keepdim=True).log()
    torch.testing.assert_close(log_mean_probability(logits).double(), expected, rtol=1e-5, atol=0)


def test_sinkhorn__equals_alternating_normalization():
    logits = torch.randn(8, K, generator=torch.Generator().manual_seed(0)) * 4
    q = np.exp(logits.double().numpy()).T  # (K, B) as SwAV and MSN have it
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * K
        q /= q.sum(axis=0, keepdims=True) * 8
    np.testing.assert_allclose(sinkhorn(logits, 3).numpy(), (q * 8).T, rtol=1e-4)
    # many iterations use every prototype equally
    usage = sinkhorn(logits, 200).mean(0)
    torch.testing.assert_close(usage, torch.full((K,), 1 / K), rtol=1e-4, atol=0)


def test_sinkhorn_centering__divides_by_the_temperature_and_has_no_state():
    scores, bias = _batches()
    centering = SinkhornCentering(K, iterations=2)
    torch.testing.assert_close(
        centering(scores[0], 0.05, bias), sinkhorn(scores[0] / 0.05 + bias, 2)
    )
    centering.update(scores[0], 0.05, bias)
    assert torch.equal(centering.center, torch.zeros(1, K))


# ---- precision and state -------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_module_cast__center_stays_float32(cast):
    # at 8 significant bits an EMA of 0.9 stands still long before it has converged
    wrapper = torch.nn.Sequential(torch.nn.Linear(2, 2), LogitCentering(K))
    wrapper[1].center.fill_(1 / 3)
    getattr(wrapper, cast)()
    assert wrapper[0].weight.dtype == getattr(torch, cast)
    assert wrapper[1].center.dtype == torch.float32
    assert torch.equal(wrapper[1].center, torch.full((1, K), 1 / 3))
    assert "1.center" in wrapper.state_dict()
    wrapper[1].update(torch.ones(2, K), 0.1)
    assert wrapper[1].center.dtype == torch.float32


@pytest.mark.parametrize("name", CENTERINGS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast__float32_maths(name, autocast):
    scores, bias = _batches()
    exact, under_autocast = make_centering(name, K), make_centering(name, K)
    for s in scores:
        expected = exact(s, 0.04, bias)
        exact.update(s, 0.04, bias)
        with torch.autocast("cpu", dtype=autocast):
            targets = under_autocast(s, 0.04, bias)
            under_autocast.update(s, 0.04, bias)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets, expected)
        torch.testing.assert_close(under_autocast.center, exact.center)
    half = exact(s.bfloat16(), 0.04, bias)
    torch.testing.assert_close(half, exact(s.bfloat16().float(), 0.04, bias))


@pytest.mark.parametrize("name", CENTERINGS)
def test_state_dict__round_trip(name):
    scores, bias = _batches()
    first, second = make_centering(name, K), make_centering(name, K)
    first.update(scores[0], 0.07, bias)
    assert list(first.state_dict()) == ["center"]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(scores[1], 0.07, bias), second(scores[1], 0.07, bias))


def test_scores_with_gradient__targets_have_none():
    scores = torch.randn(3, K, requires_grad=True)
    for name in CENTERINGS:
        centering = make_centering(name, K)
        centering.update(scores, 0.1)
        assert not centering(scores, 0.1).requires_grad
        assert not centering.center.requires_grad


# ---- bad input -----------------------------------------------------------------------------------


def test_make_centering__builds_what_the_name_says():
    kinds = {name: type(make_centering(name, K)) for name in CENTERINGS}
    assert kinds == {
        "logit": LogitCentering,
        "probability": ProbabilityCentering,
        "sinkhorn": SinkhornCentering,
    }
    assert make_centering("logit", K, momentum=0.3, raw_scores=True).raw_scores
    assert make_centering("probability", K, momentum=0.3).momentum == 0.3
    assert make_centering("sinkhorn", K, iterations=7).iterations == 7


@pytest.mark.parametrize("name", ["center", "logits", None])
def test_unknown_name__named(name):
    with pytest.raises(ValueError, match=r"centering=.* is unknown: choose one of .*'sinkhorn'"):
        make_centering(name, K)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, float("nan")])
def test_momentum_out_of_range__named(momentum):
    for kind in (LogitCentering, ProbabilityCentering):
        with pytest.raises(ValueError, match=r"center_momentum=.* must lie in \[0, 1\)"):
            kind(K, momentum)


def test_sinkhorn_without_iterations__named():
    with pytest.raises(ValueError, match="sinkhorn_iterations=0 must be at least 1"):
        SinkhornCentering(K, 0)


def test_base_class__defines_nothing():
    with pytest.raises(TypeError, match="Centering defines no targets"):
        Centering(K)(torch.zeros(1, K), 0.1)
    with pytest.raises(TypeError, match="Centering defines no center"):
        Centering(K).update(torch.zeros(1, K), 0.1)


# ---- two processes -------------------------------------------------------------------------------


def _rank_rows(counts: list[int]) -> list[list[torch.Tensor]]:
    scores, _ = _batches(rows=sum(counts))
    return [list(s.split(counts)) for s in scores]


def _run_two_steps(rank: int, counts: list[int]) -> dict[str, list[torch.Tensor]]:
    _, bias = _batches()
    modules = {
        "logit": (LogitCentering(K), None),
        "logit_vmf": (LogitCentering(K), bias),
        "probability": (ProbabilityCentering(K), None),
        "probability_vmf": (ProbabilityCentering(K), bias),
        "sinkhorn": (SinkhornCentering(K), bias),
    }
    out = {}
    for name, (centering, b) in modules.items():
        targets = []
        for parts, tau in zip(_rank_rows(counts), TEMPERATURES, strict=True):
            mine = parts[rank] if rank is not None else torch.cat(parts)
            targets.append(centering(mine, tau, b))
            centering.update(mine if rank is None else mine.split(2), tau, b)
        out[name] = [centering.center, *targets]
    return out


@pytest.mark.parametrize("counts", [[5, 2], [4, 0]])
def test_two_processes__unequal_batches__equal_one_on_all_rows(ddp, counts):
    joined = _run_two_steps(None, counts)
    first, second = ddp(_run_two_steps, counts)
    for name, (center, *targets) in joined.items():
        assert torch.equal(first[name][0], second[name][0])  # ranks never drift apart
        torch.testing.assert_close(first[name][0], center, rtol=1e-5, atol=1e-6)
        for step, target in enumerate(targets, 1):
            both = torch.cat([first[name][step], second[name][step]])
            torch.testing.assert_close(both, target, rtol=1e-4, atol=1e-6)
