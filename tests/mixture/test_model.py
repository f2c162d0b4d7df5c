"""The mixture against scipy's vMF density, the model's own softmax, and samples from scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch.nn import functional as F

from dinovmf_plugin.core.centering import LogitCentering
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.mixture.model import (
    VMFMixture,
    center_log_weights,
    log_uniform_density,
    prototype_mixture,
    typicality,
)
from dinovmf_plugin.mixture.sampling import sample_mixture, sample_vmf


@pytest.fixture
def mixture():
    generator = torch.Generator().manual_seed(0)
    return VMFMixture(
        directions=3 * torch.randn(7, 16, generator=generator),
        concentrations=torch.tensor([0.0, 0.5, 5.0, 20.0, 40.0, 80.0, 150.0]),
        log_weights=torch.randn(7, generator=generator),
    )


def scipy_log_joint(mixture, y):
    weights = mixture.log_weights.double().log_softmax(0).numpy()
    columns = []
    for k, kappa in enumerate(mixture.concentrations.tolist()):
        mu = F.normalize(mixture.directions[k].double(), dim=0).numpy()
        if kappa == 0:
            area = 2 * math.pi ** (len(mu) / 2) / math.gamma(len(mu) / 2)
            columns.append(np.full(len(y), weights[k] - math.log(area)))
        else:
            columns.append(weights[k] + stats.vonmises_fisher(mu, kappa).logpdf(y))
    return np.stack(columns, axis=1)


def test_scores__equal_scipy(mixture):
    y, _ = sample_mixture(mixture, 300, seed=1)  # more rows than one block
    joint = scipy_log_joint(mixture, y.numpy())
    total = logsumexp(joint, axis=1)
    responsibilities = np.exp(joint - total[:, None])
    scores = mixture.score(y)
    np.testing.assert_allclose(mixture.responsibilities(y), responsibilities, atol=2e-5)
    np.testing.assert_allclose(scores.log_likelihood, total, atol=5e-5)
    np.testing.assert_allclose(mixture.log_likelihood(y), total, atol=5e-5)
    assert scores.component.tolist() == responsibilities.argmax(1).tolist()
    assert torch.equal(scores.component, mixture.assign(y))
    np.testing.assert_allclose(scores.responsibility, responsibilities.max(1), atol=2e-5)
    np.testing.assert_allclose(scores.entropy, stats.entropy(responsibilities, axis=1), atol=2e-4)
    picked = mixture.directions.double()[scores.component]
    np.testing.assert_allclose(scores.cosine, (picked * y).sum(1), atol=1e-6)
    assert torch.equal(scores.concentration, mixture.concentrations[scores.component])


@pytest.mark.parametrize("normalization", ["none", "l2", "vmf"])
def test_prototype_mixture__assigns_as_the_model_does(normalization):
    torch.manual_seed(0)
    layer = Prototypes(32, 50, normalization, order=2)
    with torch.no_grad():
        if normalization != "l2":
            layer.weight_g.uniform_(-3, 3)
    y = F.normalize(torch.randn(200, 32), dim=-1)
    found = prototype_mixture(layer, 0.07)
    expected = layer(y, 0.07).softmax(-1)
    torch.testing.assert_close(found.responsibilities(y), expected, atol=2e-4, rtol=0)
    assert torch.equal(found.assign(y), expected.argmax(-1))
    torch.testing.assert_close(found.concentrations, layer.weight_g.detach().abs()[:, 0] / 0.07)


def test_uniform_weights__differ_from_the_model_where_plain_dino_has_free_norms():
    layer = Prototypes(32, 2, "none")
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([[1.0], [4.0]]))
        layer.weight_v[1] = layer.weight_v[0]
    mu = layer.directions()[:1].detach()
    across = torch.linalg.svd(mu).Vh[1:2]
    off = 0.3 * mu + (1 - 0.3**2) ** 0.5 * across
    # the same direction: plain DINO gives every image with a positive cosine to the longer prototype
    assert prototype_mixture(layer, 0.1).assign(off).tolist() == [1]
    # as densities, the precise component only wins close to its mean
    proper = prototype_mixture(layer, 0.1, torch.zeros(2))
    assert proper.assign(off).tolist() == [0]
    assert proper.assign(mu).tolist() == [1]


def test_center_log_weights__follow_the_units_of_the_center():
    usage = torch.tensor([0.5, 0.3, 0.2])
    common = {"temperature": 0.05}
    for centering, normalization, raw_scores, center in (
        ("probability", "none", False, usage.log() - 7),
        ("probability", "vmf", False, usage.log() + 3),
        ("logit", "l2", False, 0.05 * usage.log() + 1),
        ("logit", "vmf", False, usage.log()),
        ("logit", "vmf", True, 0.05 * usage.log() + 1),
    ):
        units = {"centering": centering, "normalization": normalization, "raw_scores": raw_scores}
        found = center_log_weights(center[None], **units, **common)
        torch.testing.assert_close(found.exp(), usage.double(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="sinkhorn"):
        center_log_weights(usage, centering="sinkhorn", normalization="l2", **common)


@pytest.mark.parametrize("raw_scores", [False, True])
def test_center_log_weights__are_what_training_divides_its_targets_by(raw_scores):
    torch.manual_seed(0)
    scores, bias = torch.randn(40, 6), torch.randn(6)
    centering = LogitCentering(6, momentum=0.0, raw_scores=raw_scores)
    centering.update(scores, 0.05, bias)
    log_weights = center_log_weights(
        centering.center,
        centering="logit",
        normalization="vmf",
        temperature=0.05,
        raw_scores=raw_scores,
    )
    expected = (scores / 0.05 + bias - log_weights).softmax(dim=-1)
    found = centering(scores, 0.05, bias)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_weights__shift_the_likelihood(mixture):
    y = mixture.directions[3:4]
    weights = torch.full((7,), -50.0)
    weights[3] = 0
    alone = VMFMixture(mixture.directions, mixture.concentrations, weights)
    expected = stats.vonmises_fisher(y[0].double().numpy() / float(y[0].double().norm()), 20.0)
    assert float(alone.log_likelihood(y)) == pytest.approx(
        float(expected.logpdf(expected.mu)), abs=1e-4
    )


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (3, 10.0), (64, 50.0), (256, 25.0)])
def test_sample_vmf__has_the_mean_length_of_its_concentration(dim, kappa):
    mean = torch.arange(1, dim + 1).double()
    y = sample_vmf(mean, kappa, 4000, seed=0)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(4000).double())
    cosine = (y @ F.normalize(mean, dim=0)).numpy()
    # A_p(kappa) by numerical integration of the density of the cosine
    grid = np.linspace(-1, 1, 200001)[1:-1]
    log_f = kappa * grid + (dim - 3) / 2 * np.log1p(-(grid**2))
    f = np.exp(log_f - log_f.max())
    expected = (f * grid).sum() / f.sum()
    assert cosine.mean() == pytest.approx(expected, abs=4 * cosine.std() / 4000**0.5 + 1e-3)
    assert torch.equal(y, sample_vmf(mean, kappa, 4000, seed=0))


def test_sample_vmf__is_uniform_without_concentration():
    y = sample_vmf(torch.tensor([1.0, 0.0, 0.0]), 0.0, 20000, seed=1)
    assert float(y.mean(0).norm()) < 0.02
    assert stats.kstest(y[:, 2].numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3


def test_typical_samples__outrank_uniform_noise(mixture):
    tight = VMFMixture(mixture.directions, torch.full((7,), 100.0), torch.zeros(7))
    y, _ = sample_mixture(tight, 400, seed=2)
    noise = sample_vmf(torch.ones(16), 0.0, 100, seed=3)
    reference = tight.log_likelihood(y)
    assert float(typicality(reference, reference).mean()) == pytest.approx(0.5, abs=0.01)
    assert float(typicality(tight.log_likelihood(noise), reference).max()) < 0.05


def test_log_uniform_density__is_that_of_a_component_without_concentration():
    flat = VMFMixture(torch.eye(256)[:2], torch.zeros(2), torch.zeros(2))
    assert float(flat.log_likelihood(torch.eye(256)[5:6])) == pytest.approx(
        log_uniform_density(256), abs=1e-4
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: VMFMixture(torch.eye(3), torch.ones(2), torch.zeros(3)), "concentrations"),
        (lambda: VMFMixture(torch.eye(3), -torch.ones(3), torch.zeros(3)), "kappa"),
        (lambda: prototype_mixture(Prototypes(8, 2), 0.0), "temperature=0"),
        (lambda: typicality(torch.zeros(2), torch.zeros(0)), "reference"),
        (lambda: sample_vmf(torch.zeros(3), 1.0, 5), "mean"),
        (lambda: sample_vmf(torch.ones(3), -1.0, 5), "concentration=-1"),
        (
            lambda: VMFMixture(torch.eye(3), torch.ones(3), torch.zeros(3)).assign(torch.ones(2)),
            r"\(N, 3\)",
        ),
    ],
)
def test_bad_input__is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
