"""prototype_cross_entropy against the plain formula, in every strategy and precision."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dinovmf_plugin.losses import chunked, prototype_cross_entropy
from dinovmf_plugin.losses import cross_entropy as module
from dinovmf_plugin.losses.chunked import Plan, choose_plan
from dinovmf_plugin.prototypes import Prototypes

V, Q, N, P, K, TAU = 4, 2, 3, 5, 37, 0.3
NAMES = ("embeddings", "weight", "factor", "bias")
# (keep, rows of a block, prototypes of a chunk, bound below which no running maximum is needed): chunks
# that do and do not divide K, one and several blocks of the 12 student rows, the last one smaller
SHAPES = {
    "keep": (True, 12, 10, 0.0),
    "keep-bounded": (True, 12, 10, 1e3),
    "keep-one-chunk": (True, 12, 64, 0.0),
    "blocks": (False, 5, 8, 0.0),
    "blocks-bounded": (False, 5, 8, 1e3),
    "blocks-of-one-row": (False, 1, 37, 0.0),
    "one-block": (False, 12, 1, 0.0),
}


@pytest.fixture(params=SHAPES)
def strategy(request, monkeypatch):
    use_strategy(monkeypatch, request.param)
    return request.param


def use_strategy(monkeypatch, name, operand=None):
    keep, rows, columns, safe = SHAPES[name]

    def plan(weight, total, dtype, product):
        chosen = choose_plan(weight, total, dtype, product)
        return Plan(keep, rows, columns, product, operand or chosen.operand)

    monkeypatch.setattr(module, "choose_plan", plan)
    monkeypatch.setattr(chunked, "_SAFE", safe)


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {
        "embeddings": F.normalize(normal(V, N, P), dim=-1),
        "weight": normal(K, P),
        "factor": normal(K),  # signs too
        "bias": normal(K),
    }
    fixed = {
        "targets": normal(Q, N, K).softmax(dim=-1),
        "pair_weights": normal(V, Q).abs(),
        "row_weights": normal(N).abs(),
    }
    return {k: v.requires_grad_() for k, v in leaves.items()}, fixed


def plain(leaves, fixed, normed=False):
    """The definition, term by term."""
    w = leaves["weight"]
    factor = leaves.get("factor")
    if factor is not None:
        w = (factor / w.norm(dim=1) if normed else factor)[:, None] * w
    logits = leaves["embeddings"] @ w.t() / TAU
    if leaves.get("bias") is not None:
        logits = logits + leaves["bias"]
    value = torch.zeros((), dtype=logits.dtype)
    for v, q, n in itertools.product(range(V), range(Q), range(N)):
        ce = -(fixed["targets"][q, n] * logits[v, n].log_softmax(dim=-1)).sum()
        value = value + fixed["pair_weights"][v, q] * fixed["row_weights"][n] * ce
    return value


def ours(leaves, fixed, normed=False):
    return prototype_cross_entropy(
        leaves["embeddings"],
        leaves["weight"],
        fixed["targets"],
        temperature=TAU,
        bias=leaves.get("bias"),
        pair_weights=fixed["pair_weights"],
        row_weights=fixed["row_weights"],
        **{"magnitude" if normed else "scale": leaves.get("factor")},
    )


def gradients(value, leaves):
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
@pytest.mark.parametrize("without", [(), ("bias",), ("factor",), ("factor", "bias")], ids=str)
def test_value_and_gradients__float64__equal_the_plain_formula(strategy, without, normed):
    leaves, fixed = problem()
    for name in without:
        del leaves[name]
    value, expected = ours(leaves, fixed, normed), plain(leaves, fixed, normed)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected)
    assert_equal(gradients(value, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
def test_gradcheck(strategy, normed):
    leaves, fixed = problem()

    def f(*tensors):
        return ours(dict(zip(NAMES, tensors, strict=True)), fixed, normed)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("wanted", [c for r in range(4) for c in itertools.combinations(NAMES, r)])
@pytest.mark.parametrize("name", ["keep", "blocks"])
def test_only_wanted_gradients__are_the_same(monkeypatch, name, wanted):
    use_strategy(monkeypatch, name)
    leaves, fixed = problem()
    expected = gradients(plain(leaves, fixed, normed=True), leaves)
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in wanted)
    value = ours(leaves, fixed, normed=True)
    assert value.requires_grad == bool(wanted)
    torch.testing.assert_close(value.detach(), plain(leaves, fixed, normed=True).detach())
    if wanted:
        value.backward()
    for key, leaf in leaves.items():
        assert (leaf.grad is not None) == (key in wanted)
        if key in wanted:
            torch.testing.assert_close(leaf.grad, expected[key])


def test_no_grad__gives_the_value(strategy):
    leaves, fixed = problem()
    with torch.no_grad():
        value = ours(leaves, fixed)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(leaves, fixed).detach())


def test_targets_that_do_not_sum_to_one__follow_the_formula(strategy):
    leaves, fixed = problem()
    fixed["targets"] = (
        fixed["targets"] * torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)[:, None]
    )
    value, expected = ours(leaves, fixed), plain(leaves, fixed)
    torch.testing.assert_close(value, expected)
    assert_equal(gradients(value, leaves), gradients(expected, leaves))


def test_defaults__are_the_mean_and_one_view_may_be_2d():
    leaves, fixed = problem(torch.float32)
    y, w, t = leaves["embeddings"], leaves["weight"], fixed["targets"]
    pairs = [
        F.cross_entropy(view @ w.t() / TAU, target)  # torch's own soft-target cross-entropy
        for view in y
        for target in t
    ]
    value = prototype_cross_entropy(y, w, t, temperature=TAU)
    torch.testing.assert_close(value, torch.stack(pairs).mean())
    one = prototype_cross_entropy(y[0], w, t[0], temperature=TAU)
    torch.testing.assert_close(one, pairs[0])


def test_memory_layout__does_not_matter(strategy):
    leaves, fixed = problem()
    strided = {
        "embeddings": leaves["embeddings"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "weight": leaves["weight"].detach().t().contiguous().t(),
        "factor": torch.stack([leaves["factor"].detach()] * 2, dim=1)[:, 0],
        "bias": torch.stack([leaves["bias"].detach()] * 2, dim=1)[:, 0],
    }
    strided = {k: v.requires_grad_() for k, v in strided.items()}
    value = ours(leaves, fixed)
    fixed["targets"] = fixed["targets"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    other = ours(strided, fixed)
    torch.testing.assert_close(other, value)
    assert_equal(gradients(other, strided), gradients(value, leaves))


def test_no_rows__is_zero_and_reaches_every_parameter():
    leaves, _ = problem(torch.float32)
    value = prototype_cross_entropy(
        leaves["embeddings"][:, :0],
        leaves["weight"],
        torch.zeros(Q, 0, K),
        temperature=TAU,
        magnitude=leaves["factor"],
        bias=leaves["bias"],
    )
    assert value.item() == 0
    for grad in gradients(value, leaves).values():
        assert not grad.any()


# ---- what autograd may do with it ----------------------------------------------------------------


def test_scaled_loss_and_retained_graph__scale_and_repeat_the_gradients(strategy):
    leaves, fixed = problem()
    expected = gradients(3 * plain(leaves, fixed), leaves)
    loss = 3 * ours(leaves, fixed)
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
    sums = {name: leaf.grad / 3 for name, leaf in leaves.items()}
    assert_equal(sums, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradient_accumulation__keeps_the_first_gradients_intact(strategy):
    leaves, fixed = problem()
    for _ in range(2):
        ours(leaves, fixed).backward()
    expected = gradients(plain(leaves, fixed), leaves)
    assert_equal({name: leaf.grad / 2 for name, leaf in leaves.items()}, expected)


def test_second_derivative__is_refused(strategy):
    leaves, fixed = problem()
    grads = torch.autograd.grad(ours(leaves, fixed), list(leaves.values()), create_graph=True)
    assert_equal(dict(zip(leaves, grads, strict=True)), gradients(plain(leaves, fixed), leaves))
    for grad in grads:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (grad.sum() + leaves["weight"].sum()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing__gives_the_same_gradients(strategy, reentrant):
    leaves, fixed = problem()

    def f(*tensors):
        return ours(dict(zip(NAMES, tensors, strict=True)), fixed)

    value = checkpoint(f, *leaves.values(), use_reentrant=reentrant)
    value.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert_equal(grads, gradients(plain(leaves, fixed), leaves))


def test_repeated__is_bitwise_equal(strategy):
    leaves, fixed = problem(torch.float32)
    runs = [gradients(ours(leaves, fixed), leaves) for _ in range(2)]
    assert_equal(*runs, rtol=0, atol=0)


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prototypes = Prototypes(P, K, "vmf")

    def forward(self, y, targets):
        layer = self.prototypes
        return prototype_cross_entropy(
            y,
            layer.weight_v,
            targets,
            temperature=TAU,
            magnitude=layer.weight_g.squeeze(-1),
            bias=layer.log_normalizer(TAU),
        )


def _ddp_gradients(rank, keep):
    if not keep:
        module.choose_plan = lambda w, n, dtype, product: Plan(False, 5, 8, product, dtype)
    model = torch.nn.parallel.DistributedDataParallel(_Layer())
    leaves, fixed = problem(torch.float32, seed=rank)
    model(leaves["embeddings"].detach(), fixed["targets"]).backward()
    module.choose_plan = choose_plan
    return {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "blocks"])
def test_two_processes__average_their_gradients(ddp, keep):
    first, second = ddp(_ddp_gradients, keep)
    layer = _Layer()
    for rank in range(2):
        leaves, fixed = problem(torch.float32, seed=rank)
        (layer(leaves["embeddings"].detach(), fixed["targets"]) / 2).backward()
    assert_equal(first, {name: p.grad for name, p in layer.named_parameters()})
    assert_equal(first, second, rtol=0, atol=0)


# ---- precision -----------------------------------------------------------------------------------


UNBOUNDED = [name for name in SHAPES if "bounded" not in name]


@pytest.mark.parametrize("kappa", [1e3, 1e5])
@pytest.mark.parametrize("name", [*UNBOUNDED, "chosen"])
def test_huge_logits__stay_finite_and_right(monkeypatch, name, kappa):
    if name != "chosen":
        use_strategy(monkeypatch, name)
    leaves, fixed = problem(torch.float32)
    with torch.no_grad():
        leaves["factor"].mul_(kappa * TAU)
        leaves["bias"].mul_(kappa)
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    value = ours(leaves, fixed, normed=True)
    expected = plain(exact, {k: v.double() for k, v in fixed.items()}, normed=True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    grads = gradients(value, leaves)
    assert all(grad.isfinite().all() for grad in grads.values())
    exact_grads = gradients(expected, exact)
    assert_equal({k: v.double() for k, v in grads.items()}, exact_grads, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_chunks_whose_logits_lie_far_apart__do_not_over_or_underflow(monkeypatch, name, order):
    """The running maximum moves by more than float32's exponent from one chunk to the next."""
    use_strategy(monkeypatch, name)
    leaves, fixed = problem(torch.float32)
    with torch.no_grad():
        leaves["bias"].copy_(torch.linspace(-4000, 4000, K) * order)
    value, expected = ours(leaves, fixed), plain(leaves, fixed)
    torch.testing.assert_close(value, expected)
    assert_equal(gradients(value, leaves), gradients(expected, leaves), rtol=1e-3, atol=1e-5)


HALVES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-products": (torch.bfloat16, torch.bfloat16),
    "fp16-products": (torch.float16, torch.float16),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["keep", "keep-bounded", "blocks"])
def test_autocast__float32_softmax_and_bias_and_gradients_of_the_leaves(monkeypatch, name, half):
    dtype, operand = HALVES[half]
    use_strategy(monkeypatch, name, operand)
    leaves, fixed = problem(torch.float32)
    with torch.no_grad():
        leaves["bias"].sub_(0 if "bounded" in name else 344)  # bf16 numbers are 2 apart there
    with torch.autocast("cpu", dtype):
        value = ours(leaves, fixed, normed=True)
    expected = plain(leaves, fixed, normed=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=5e-3, atol=0)
    grads, exact = gradients(value, leaves), gradients(expected, leaves)
    for key in NAMES:
        assert grads[key].dtype == torch.float32
        error = (grads[key] - exact[key]).norm() / exact[key].norm()
        assert error < 0.02, f"{key}: {error}"


def test_fp16_products__keep_tiny_gradients():
    """1 / (pairs * N * K) of a real run is far below float16's smallest number."""
    leaves, fixed = problem(torch.float32)
    plan = Plan(True, V * N, K, torch.float16, torch.float16)
    tiny = {**fixed, "pair_weights": fixed["pair_weights"] * 1e-9}
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.float16):
        patch.setattr(module, "choose_plan", lambda *_: plan)
        grads = gradients(ours(leaves, tiny), leaves)
    exact = gradients(plain(leaves, tiny), leaves)
    for key in NAMES:
        assert (grads[key] - exact[key]).norm() < 0.02 * exact[key].norm(), key


def test_half_inputs_without_autocast__give_half_gradients_and_a_float32_value(strategy):
    leaves, fixed = problem(torch.bfloat16)
    wide = {k: v.detach().float().requires_grad_() for k, v in leaves.items()}
    wide_fixed = {k: v.float() for k, v in fixed.items()}
    value, expected = ours(leaves, fixed), plain(wide, wide_fixed)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    exact = gradients(expected, wide)
    for key, grad in gradients(value, leaves).items():
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - exact[key]).norm() < 0.03 * exact[key].norm(), key


def test_float64__ignores_autocast():
    leaves, fixed = problem()
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(leaves, fixed)
    torch.testing.assert_close(value, plain(leaves, fixed))


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
def test_nothing_as_large_as_all_logits_is_made(monkeypatch, frozen):
    """Blocks of 5 of the 12 student rows; with frozen prototypes not even a block is stored."""
    use_strategy(monkeypatch, "blocks")
    leaves, fixed = problem(torch.float32)
    for name in ("weight", "factor", "bias"):
        leaves[name].requires_grad_(not frozen)
    with _Largest() as largest:
        ours(leaves, fixed).backward()
    _, rows, columns, _ = SHAPES["blocks"]
    given = max(x.numel() for x in (*leaves.values(), *fixed.values()))
    assert largest.elements <= max(given, V * N * columns if frozen else rows * K) < V * N * K


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {
    "embeddings": (V, N, P),
    "weight": (K, P),
    "targets": (Q, N, K),
    "scale": (K,),
    "bias": (K,),
    "pair_weights": (V, Q),
    "row_weights": (N,),
}
BAD = [
    ("embeddings", (V, N, P + 1), "weight has shape"),
    ("embeddings", (V, N + 1, P), "targets has shape"),
    ("embeddings", (P,), "embeddings"),
    ("embeddings", (0, N, P), "V=0"),
    ("weight", (K, P, 1), "weight"),
    ("weight", (K + 1, P), "targets has shape"),
    ("targets", (Q, N, K + 1), "targets has shape"),
    ("targets", (K,), "targets"),
    ("scale", (K, 1), "scale has shape"),
    ("bias", (1,), "bias has shape"),
    ("pair_weights", (Q, V), "pair_weights has shape"),
    ("row_weights", (N + 1,), "row_weights has shape"),
]


def call(temperature=TAU, **tensors):
    arguments = {k: torch.ones(s) for k, s in GOOD.items()} | tensors
    return prototype_cross_entropy(temperature=temperature, **arguments)


@pytest.mark.parametrize(("name", "shape", "message"), BAD)
def test_wrong_shape__names_the_tensor(name, shape, message):
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.ones(shape)})


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_temperature__must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        call(temperature=temperature)


@pytest.mark.parametrize("name", ["targets", "pair_weights", "row_weights"])
def test_gradient_that_would_be_lost__is_refused(name):
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        call(**{name: torch.ones(GOOD[name], requires_grad=True)})


def test_scale_and_magnitude__exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        call(magnitude=torch.ones(K))
