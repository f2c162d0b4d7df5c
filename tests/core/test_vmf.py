"""The vMF normalizer against mpmath at 40 digits and scipy: values, derivatives, half precision."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from dinovmf_plugin.core import vmf

mpmath.mp.dps = 40

KAPPAS = [0.0, 1e-3, 0.5, 1, 5, 14.3, 25, 50, 100, 200, 350, 500, 750, 1000, 1500, 2000]


def mp_log_normalizer(kappa: float, dim: int) -> mpmath.mpf:
    """``log C_p(kappa) - log C_p(0)`` straight from the definition, nothing simplified."""
    if kappa == 0:
        return mpmath.mpf(0)
    nu, x = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(kappa)
    log_c = (
        nu * mpmath.log(x)
        - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi)
        - mpmath.log(mpmath.besseli(nu, x))
    )
    # C_p(0) is one over the sphere's area
    area = 2 * mpmath.pi ** (mpmath.mpf(dim) / 2) / mpmath.gamma(mpmath.mpf(dim) / 2)
    return log_c + mpmath.log(area)


def mp_mean_resultant_length(kappa: float, dim: int) -> mpmath.mpf:
    nu, x = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(kappa)
    return mpmath.besseli(nu + 1, x) / mpmath.besseli(nu, x)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return np.array([float(mp_log_normalizer(kappa, 256)) for kappa in KAPPAS])


# ---- the expansion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "bound", "not_below"), [(0, 1e-3, 1e-4), (1, 5e-6, 1e-7), (2, 1e-7, 0)]
)
def test_log_normalizer__against_mpmath__error_of_the_order(reference, order, bound, not_below):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    error = np.abs(vmf.log_normalizer(kappa, 256, order=order).numpy() - reference).max()
    # the lower bound shows that the order is really used: each term wins at least a factor of 20
    assert not_below <= error < bound


@pytest.mark.parametrize(("order", "bound"), [(0, 2e-2), (1, 9e-4), (2, 5.5e-5)])
def test_log_normalizer__small_dimension__every_digit_of_the_terms_counts(order, bound):
    kappa = np.geomspace(0.01, 2000, 60)
    expected = [float(mp_log_normalizer(k, 16)) for k in kappa]
    ours = vmf.log_normalizer(torch.tensor(kappa), 16, order=order).numpy()
    assert np.abs(ours - expected).max() < bound


def test_log_normalizer__default_order__is_the_papers(reference):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    torch.testing.assert_close(
        vmf.log_normalizer(kappa, 256), vmf.log_normalizer(kappa, 256, order=0), rtol=0, atol=0
    )


def test_log_normalizer__order_0__is_equation_5_term_by_term():
    # the paper's Eq. 5 with U_0 = 1, without any simplification: log I_nu(kappa) ~
    # nu eta - log(2 pi nu)/2 - log(1 + (kappa/nu)^2)/4
    nu = 127.0
    kappa = np.array([1.0, 10, 50, 200, 1000, 2000])
    z = kappa / nu
    eta = np.sqrt(1 + z**2) + np.log(z / (1 + np.sqrt(1 + z**2)))
    log_bessel = nu * eta - 0.5 * np.log(2 * np.pi * nu) - 0.25 * np.log1p(z**2)
    log_c = nu * np.log(kappa) - 128 * np.log(2 * np.pi) - log_bessel
    ours = vmf.log_normalizer(torch.tensor(kappa), 256).numpy()
    np.testing.assert_allclose(np.diff(ours), np.diff(log_c), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_log_normalizer__gradient__is_minus_mean_resultant_length(order):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(vmf.log_normalizer(kappa, 256, order=order).sum(), kappa)
    exact = np.array([float(mp_mean_resultant_length(k, 256)) if k else 0.0 for k in KAPPAS])
    bound = {0: 1e-4, 1: 1e-6, 2: 1e-8}[order]
    assert np.abs(gradient.numpy() + exact).max() < bound


@pytest.mark.parametrize("order", [0, 1, 2])
def test_log_normalizer__gradcheck(order):
    kappa = torch.tensor([-3.0, 0.0, 0.7, 20.0, 300.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda k: vmf.log_normalizer(k, 16, order=order), kappa)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_log_normalizer__shape__even_zero_at_zero_decreasing(order):
    kappa = torch.linspace(0, 3000, 500, dtype=torch.float64).reshape(5, 100)
    value = vmf.log_normalizer(kappa, 256, order=order)
    assert value.shape == kappa.shape
    assert value[0, 0] == 0
    torch.testing.assert_close(vmf.log_normalizer(-kappa, 256, order=order), value)
    assert bool((value.flatten().diff() < 0).all())


@pytest.mark.parametrize("dim", [*range(3, 16)])
def test_log_normalizer__below_16_dimensions__exact_for_every_order(dim):
    kappa = np.array([0.0, 1e-6, 0.1, 0.6, 3, 14.3, 100, 2000, 1e5])
    given = torch.tensor(kappa, requires_grad=True)
    value = vmf.log_normalizer(given, dim)
    (gradient,) = torch.autograd.grad(value.sum(), given)
    exact = np.array([float(mp_log_normalizer(k, dim)) for k in kappa])
    np.testing.assert_allclose(value.detach().numpy(), exact, rtol=1e-7, atol=1e-15)
    ratio = np.array([float(mp_mean_resultant_length(k, dim)) if k else 0.0 for k in kappa])
    np.testing.assert_allclose(-gradient.numpy(), ratio, rtol=1e-7, atol=1e-15)
    for order in (1, 2):
        assert torch.equal(vmf.log_normalizer(given, dim, order=order), value)
    float32 = vmf.log_normalizer(torch.tensor(kappa).float(), dim)
    assert float32.dtype == torch.float32
    np.testing.assert_allclose(float32.numpy(), exact, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dim", [3, 4])
def test_log_normalizer__few_dimensions__gradcheck(dim):
    kappa = torch.tensor([-3.0, 0.0, 0.7, 20.0, 300.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda k: vmf.log_normalizer(k, dim), kappa)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dim", [*range(3, 40), 64, 127, 256, 1024, 4096])
def test_log_normalizer__every_dimension__decreasing_in_the_absolute_value(dim, order):
    kappa = (
        torch.cat([torch.logspace(-4, 5, 400), torch.linspace(0.01, 20, 400)]).double().sort()[0]
    )
    kappa.requires_grad_()
    value = vmf.log_normalizer(kappa, dim, order=order)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    assert bool((value.detach().diff() < 0).all())
    assert bool((gradient < 0).all())
    # the slope is that of the mean's length: within 2 % for the paper's order, closer above
    exact = vmf.mean_resultant_length(kappa.detach(), dim)
    assert float(((gradient + exact) / exact).abs().max()) < {0: 2.1e-2, 1: 3.3e-3, 2: 5e-4}[order]
    torch.testing.assert_close(vmf.log_normalizer(-kappa, dim, order=order), value)


@pytest.mark.parametrize("dim", [3, 16, 17, 256])
def test_log_normalizer__largest_concentrations__finite(dim):
    kappa = torch.tensor(
        [1e10, 1e30, 3e38], requires_grad=True
    )  # weights over a temperature of 1e-6
    value = vmf.log_normalizer(kappa, dim)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    assert bool(value.isfinite().all())
    torch.testing.assert_close(gradient, -torch.ones(3))


def test_log_normalizer__small_dimension__finite_gradient_at_zero():
    kappa = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(vmf.log_normalizer(kappa, 3, order=2).sum(), kappa)
    assert torch.equal(gradient, torch.zeros(3))


@pytest.mark.parametrize("dim", [2, 1, 0, -4])
def test_log_normalizer__dim_below_3__named(dim):
    with pytest.raises(ValueError, match=rf"dim={dim} .*dim >= 3"):
        vmf.log_normalizer(torch.ones(1), dim)


@pytest.mark.parametrize("order", [-1, 3, 0.5])
def test_log_normalizer__unknown_order__named(order):
    with pytest.raises(ValueError, match=rf"order={order} .*\(0, 1, 2\)"):
        vmf.log_normalizer(torch.ones(1), 256, order=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_log_normalizer__half_precision__float32_and_finite(dtype, autocast):
    # 1e4 is finite in float16 too; its square is not
    kappa = torch.tensor([0.0, 1e-6, 1e-3, 1, 10, 100, 1e3, 1e4]).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        value = vmf.log_normalizer(kappa, 256)
        (gradient,) = torch.autograd.grad(value.sum(), kappa)
    assert value.dtype == torch.float32
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())
    # not only finite: as exact as float32 is for the rounded concentrations that came in
    exact = vmf.log_normalizer(kappa.detach().double(), 256)
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-4)


def test_log_normalizer__float32__differences_keep_four_digits():
    # C_p itself is 344 at kappa = 0, where bfloat16 has a spacing of 2: D must not carry that offset
    kappa = torch.tensor([10.0, 10.1, 14.2857, 25.0])
    exact = np.array([float(mp_log_normalizer(float(k), 256)) for k in kappa])
    error = np.abs(vmf.log_normalizer(kappa, 256, order=2).double().numpy() - exact)
    assert error.max() < 2e-6


# ---- mean resultant length -----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 16, 256, 4096])
def test_mean_resultant_length__equals_scipy_ratio(dim):
    kappa = np.array([1.0, 2.5, 10, 100, 400, 1500, 1e4])
    nu = dim / 2 - 1
    with np.errstate(invalid="ignore"):
        expected = special.ive(nu + 1, kappa) / special.ive(nu, kappa)
    usable = special.ive(nu + 1, kappa) > 1e-200
    ours = vmf.mean_resultant_length(torch.tensor(kappa), dim).numpy()
    np.testing.assert_allclose(ours[usable], expected[usable], rtol=1e-11)
    assert np.isfinite(ours).all()
    assert usable.any()


@pytest.mark.parametrize("kappa", [1e-8, 0.01, 14.3, 2000.0, 1e5])
def test_mean_resultant_length__equals_mpmath(kappa):
    ours = vmf.mean_resultant_length(torch.tensor(kappa, dtype=torch.float64), 256)
    np.testing.assert_allclose(float(ours), float(mp_mean_resultant_length(kappa, 256)), rtol=1e-12)


def test_mean_resultant_length__shape_sign_and_dtype():
    kappa = torch.tensor([[-50.0, 0.0], [50.0, 1e5]])
    value = vmf.mean_resultant_length(kappa, 256)
    assert value.shape == kappa.shape
    assert value.dtype == torch.float32
    assert value[0, 1] == 0
    assert value[0, 0] == -value[1, 0]
    assert 0.99 < value[1, 1] < 1
    assert vmf.mean_resultant_length(kappa[:1].half(), 256).dtype == torch.float32
    assert vmf.mean_resultant_length(kappa.double(), 256).dtype == torch.float64


def test_mean_resultant_length__non_finite__limit_or_nan():
    value = vmf.mean_resultant_length(torch.tensor([torch.inf, -torch.inf, torch.nan, 50.0]), 256)
    torch.testing.assert_close(value[:2], torch.tensor([1.0, -1.0]))
    assert bool(value[2].isnan())
    assert value[3] == vmf.mean_resultant_length(torch.tensor(50.0), 256)


@pytest.mark.parametrize("dim", [2, 3, 64])
def test_mean_resultant_length__gradcheck(dim):
    kappa = torch.tensor([-8.0, 0.3, 4.0, 60.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda k: vmf.mean_resultant_length(k, dim), kappa)


def test_mean_resultant_length__gradient_at_zero__one_over_dim():
    kappa = torch.zeros(2, requires_grad=True)
    vmf.mean_resultant_length(kappa, 50).sum().backward()
    torch.testing.assert_close(kappa.grad, torch.full((2,), 1 / 50))


def test_mean_resultant_length__dim_below_2__named():
    with pytest.raises(ValueError, match="dim=1 .*dim >= 2"):
        vmf.mean_resultant_length(torch.ones(1), 1)


# ---- the exact reference -------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 4, 16, 255, 256, 1024, 4096])
def test_exact_log_normalizer__equals_mpmath(dim):
    kappa = np.array([0.0, 1e-6, 0.5, 0.999, 1.001, 3, 20, 127, 700, 2000, 3000, 5000, 1e5])
    expected = [float(mp_log_normalizer(float(k), dim)) for k in kappa]
    np.testing.assert_allclose(
        vmf.exact_log_normalizer(kappa, dim), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dim", [2, 3, 7, 64, 256, 1000, 4096])
def test_exact_log_normalizer__whole_range__finite_and_decreasing(dim):
    kappa = np.concatenate([[0.0], np.geomspace(1e-3, 1e5, 400)])
    value = vmf.exact_log_normalizer(kappa, dim)
    assert value.dtype == np.float64
    assert np.isfinite(value).all()
    assert (np.diff(value) < 0).all()


def test_exact_log_normalizer__scalar_and_shape():
    assert vmf.exact_log_normalizer(0.0, 256) == 0
    assert vmf.exact_log_normalizer(np.ones((2, 3)), 256).shape == (2, 3)


@pytest.mark.parametrize("kappa", [-1.0, np.nan, np.inf])
def test_exact_log_normalizer__impossible_concentration__named(kappa):
    with pytest.raises(ValueError, match="negative or non-finite"):
        vmf.exact_log_normalizer([1.0, kappa], 256)


def test_exact_log_normalizer__dim_below_2__named():
    with pytest.raises(ValueError, match="dim=1 .*dim >= 2"):
        vmf.exact_log_normalizer([1.0], 1)


# ---- the density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 0.5, 5.0, 50.0])
def test_log_density__integrates_to_one(kappa):
    concentration = torch.tensor([kappa], dtype=torch.float64)

    def on_circle(angle: float) -> float:
        y = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        mean = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        return float(vmf.log_density(y, mean, concentration).exp())

    def on_sphere(height: float) -> float:
        y = torch.tensor([[math.sqrt(1 - height**2), 0.0, height]], dtype=torch.float64)
        mean = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
        return 2 * math.pi * float(vmf.log_density(y, mean, concentration).exp())

    assert integrate.quad(on_circle, -math.pi, math.pi, points=[0])[0] == pytest.approx(1, abs=1e-7)
    assert integrate.quad(on_sphere, -1, 1)[0] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_log_density__equals_scipy(dim):
    generator = np.random.default_rng(0)
    y = generator.standard_normal((20, dim))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    mean = y[0]
    expected = stats.vonmises_fisher(mean, 7.5).logpdf(y)
    ours = vmf.log_density(
        torch.tensor(y), torch.tensor(mean), torch.tensor([7.5], dtype=torch.float64)
    )
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
