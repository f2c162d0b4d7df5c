"""The Triton kernels, in Triton's interpreter on the CPU: values and gradients of the plain formula.

Run by ``test_fused`` in a process of its own: whether kernels are interpreted is decided when triton is
imported.
"""

from __future__ import annotations

import pytest
import torch

from dinovmf_plugin.losses import fused

NAMES = ("embeddings", "weight", "factor", "bias")
# the problem has 12 student rows, 37 prototypes of 5 numbers and 6 teacher rows: last tiles are partial
TILES = {
    "one share": fused.Tiles(16, 16, 16, 16, 16, programs=1),
    "several shares": fused.Tiles(16, 16, 32, 32, 16, programs=64),
    "one tile": fused.Tiles(16, 64, 16, 64, 16, programs=1),
}


def ours(case, leaves, fixed, normed, tiles, operand=torch.float32):
    factor, bias = leaves.get("factor"), leaves.get("bias")
    return fused.FusedCrossEntropy.apply(
        leaves["embeddings"],
        leaves["weight"],
        factor,
        bias,
        fixed["targets"],
        fixed["pair_weights"],
        fixed["row_weights"],
        case.sizes.tau,
        normed,
        operand,
        tiles,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
@pytest.mark.parametrize("without", [(), ("bias",), ("factor",), ("factor", "bias")], ids=str)
@pytest.mark.parametrize("tiles", TILES)
def test_value_and_gradients__float32__equal_the_plain_formula(case, tiles, without, normed):
    leaves, fixed = case.problem(torch.float32)
    for name in without:
        del leaves[name]
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    expected = case.plain(exact, {k: v.double() for k, v in fixed.items()}, normed)
    value = ours(case, leaves, fixed, normed and "factor" in leaves, TILES[tiles])
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    found, exact_gradients = case.gradients(value, leaves), case.gradients(expected, exact)
    for name, grad in found.items():
        error = (grad.double() - exact_gradients[name]).norm() / exact_gradients[name].norm()
        assert error < 1e-5, f"{name}: {error}"


def test_half_precision_operands__accumulate_in_float32(case):
    """float16 stands for bfloat16, which Triton's interpreter cannot multiply."""
    leaves, fixed = case.problem(torch.float32)
    value = ours(case, leaves, fixed, True, TILES["several shares"], torch.float16)
    expected = case.plain(leaves, fixed, True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=5e-3, atol=0)
    exact = case.gradients(expected, leaves)
    for name, grad in case.gradients(value, leaves).items():
        assert (grad - exact[name]).norm() < 0.02 * exact[name].norm(), name


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_logits_far_apart__do_not_over_or_underflow(case, order):
    leaves, fixed = case.problem(torch.float32)
    with torch.no_grad():
        leaves["bias"].copy_(torch.linspace(-4000, 4000, case.sizes.K) * order)
    value, expected = (
        ours(case, leaves, fixed, False, TILES["several shares"]),
        case.plain(leaves, fixed),
    )
    torch.testing.assert_close(value, expected)
    case.assert_equal(
        case.gradients(value, leaves), case.gradients(expected, leaves), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("wanted", [(), ("embeddings",), ("weight",), ("factor", "bias")], ids=str)
def test_only_wanted_gradients__are_the_same(case, wanted):
    leaves, fixed = case.problem(torch.float32)
    expected = case.gradients(case.plain(leaves, fixed, True), leaves)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    value = ours(case, leaves, fixed, True, TILES["one share"])
    assert value.requires_grad == bool(wanted)
    if wanted:
        (3 * value).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(leaf.grad, 3 * expected[name], rtol=1e-4, atol=1e-6)


def test_retained_graph_and_second_derivative(case):
    leaves, fixed = case.problem(torch.float32)
    value = ours(case, leaves, fixed, True, TILES["one share"])
    first = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="no second derivative"):
        again[1].sum().backward()
