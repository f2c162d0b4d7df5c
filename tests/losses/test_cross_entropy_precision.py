"""prototype_cross_entropy: precision, extreme logits, sizes and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinovmf_plugin.losses import prototype_cross_entropy
from dinovmf_plugin.losses.plan import choose_plan

# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e3, 1e5])
def test_huge_logits__stay_finite_and_right(case, any_size_strategy, kappa):
    leaves, fixed = case.problem(torch.float32)
    with torch.no_grad():
        leaves["factor"].mul_(kappa * case.sizes.tau)
        leaves["bias"].mul_(kappa)
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    value = case.ours(leaves, fixed, normed=True)
    expected = case.plain(exact, {k: v.double() for k, v in fixed.items()}, normed=True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    grads = case.gradients(value, leaves)
    assert all(grad.isfinite().all() for grad in grads.values())
    exact_grads = case.gradients(expected, exact)
    case.assert_equal({k: v.double() for k, v in grads.items()}, exact_grads, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_chunks_whose_logits_lie_far_apart__do_not_over_or_underflow(
    case, any_size_strategy, order
):
    """The running maximum moves by more than float32's exponent from one chunk to the next."""
    leaves, fixed = case.problem(torch.float32)
    with torch.no_grad():
        leaves["bias"].copy_(torch.linspace(-4000, 4000, case.sizes.K) * order)
    value, expected = case.ours(leaves, fixed), case.plain(leaves, fixed)
    torch.testing.assert_close(value, expected)
    case.assert_equal(
        case.gradients(value, leaves), case.gradients(expected, leaves), rtol=1e-3, atol=1e-5
    )


HALVES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-products": (torch.bfloat16, torch.bfloat16),
    "fp16-products": (torch.float16, torch.float16),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["keep", "keep-bounded", "blocks"])
def test_autocast__float32_softmax_and_bias_and_gradients_of_the_leaves(case, name, half):
    dtype, operand = HALVES[half]
    case.use(name, operand)
    leaves, fixed = case.problem(torch.float32)
    with torch.no_grad():
        leaves["bias"].sub_(0 if "bounded" in name else 344)  # bf16 numbers are 2 apart there
    with torch.autocast("cpu", dtype):
        value = case.ours(leaves, fixed, normed=True)
    expected = case.plain(leaves, fixed, normed=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=5e-3, atol=0)
    grads, exact = case.gradients(value, leaves), case.gradients(expected, leaves)
    for key in leaves:
        assert grads[key].dtype == torch.float32
        error = (grads[key] - exact[key]).norm() / exact[key].norm()
        assert error < 0.02, f"{key}: {error}"


def test_fp16_products__keep_tiny_gradients(case):
    """1 / (pairs * N * K) of a real run is far below float16's smallest number."""
    leaves, fixed = case.problem(torch.float32)
    case.use("keep", torch.float16)
    tiny = {**fixed, "pair_weights": fixed["pair_weights"] * 1e-9}
    with torch.autocast("cpu", torch.float16):
        grads = case.gradients(case.ours(leaves, tiny), leaves)
    exact = case.gradients(case.plain(leaves, tiny), leaves)
    for key in leaves:
        assert (grads[key] - exact[key]).norm() < 0.02 * exact[key].norm(), key


def test_half_inputs_without_autocast__give_half_gradients_and_a_float32_value(case, strategy):
    leaves, fixed = case.problem(torch.bfloat16)
    wide = {k: v.detach().float().requires_grad_() for k, v in leaves.items()}
    wide_fixed = {k: v.float() for k, v in fixed.items()}
    value, expected = case.ours(leaves, fixed), case.plain(wide, wide_fixed)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    exact = case.gradients(expected, wide)
    for key, grad in case.gradients(value, leaves).items():
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - exact[key]).norm() < 0.03 * exact[key].norm(), key


def test_float64__ignores_autocast(case):
    leaves, fixed = case.problem()
    with torch.autocast("cpu", torch.bfloat16):
        value = case.ours(leaves, fixed)
    torch.testing.assert_close(value, case.plain(leaves, fixed))


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 32, 192, 768, 5000])
@pytest.mark.parametrize(("k", "p"), [(65536, 256), (8192, 256), (1024, 256), (7, 3)])
def test_chosen_sizes__fit_the_problem_and_bound_the_memory(rows, k, p):
    plan = choose_plan(torch.empty(k, p, device="meta"), rows, torch.float32, torch.float32)
    assert plan.keep == (plan.rows == rows)  # one block waits, several do not
    assert 1 <= plan.rows <= rows
    assert 1 <= plan.columns <= k
    cpu = choose_plan(torch.empty(k, p), rows, torch.float32, torch.float32)
    assert 4 * cpu.rows * k <= max(96 * 2**20, 4 * p * k)
    assert 4 * cpu.columns * cpu.rows <= max(9 * 2**20, 4 * (256 + 64) * cpu.rows)


@pytest.mark.parametrize("norm", [1.0, 30.0], ids=["bounded", "maximum"])
def test_sizes_of_a_real_run__equal_torch(norm):
    """Chosen plan, several chunks and, on Linux, huge pages, whose tensors are like any other."""
    torch.manual_seed(0)
    views, n, k, p = 3, 6, 16384, 64
    y = F.normalize(torch.randn(views, n, p), dim=-1).requires_grad_()
    v, g = torch.randn(k, p, requires_grad=True), torch.full((k,), norm, requires_grad=True)
    targets = torch.randn(1, n, k).softmax(dim=-1)
    assert 4 * k * p >= 1 << 22

    value = prototype_cross_entropy(y, v, targets, temperature=0.1, magnitude=g)
    value.backward()
    logits = y @ (g[:, None] * F.normalize(v, dim=-1)).t() / 0.1
    expected = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    torch.testing.assert_close(value, expected)
    for leaf, grad in zip((y, v, g), torch.autograd.grad(expected, (y, v, g)), strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    before, change = v.detach().clone(), copy.deepcopy(v.grad)
    del value, expected, logits
    torch.optim.SGD([v], lr=1.0).step()
    torch.testing.assert_close(v.detach(), before - change)


class _Largest(TorchDispatchMode):
    """Largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_as_large_as_all_logits_is_made(case, frozen):
    """Blocks of 5 of the 12 student rows; with frozen prototypes not even a block is stored."""
    case.use("blocks")
    leaves, fixed = case.problem(torch.float32)
    for name in ("weight", "factor", "bias"):
        leaves[name].requires_grad_(not frozen)
    with _Largest() as largest:
        case.ours(leaves, fixed).backward()
    _, rows, columns, _ = case.shapes["blocks"]
    size = case.sizes
    logits = size.V * size.N * size.K
    given = max(x.numel() for x in (*leaves.values(), *fixed.values()))
    stored = size.V * size.N * columns if frozen else rows * size.K
    assert largest.elements <= max(given, stored) < logits
