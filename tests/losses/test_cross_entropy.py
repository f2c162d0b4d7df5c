"""prototype_cross_entropy: value and gradients against the plain formula, in every strategy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses import cross_entropy as module
from dinovmf_plugin.losses import prototype_cross_entropy
from dinovmf_plugin.losses.plan import Plan, choose_plan

NAMES = ("embeddings", "weight", "factor", "bias")

# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
def test_plain_formula__equals_its_definition_term_by_term(case, normed):
    leaves, fixed = case.problem()
    plain, definition = case.plain(leaves, fixed, normed), case.term_by_term(leaves, fixed, normed)
    torch.testing.assert_close(plain, definition)
    case.assert_equal(case.gradients(plain, leaves), case.gradients(definition, leaves))


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
@pytest.mark.parametrize("without", [(), ("bias",), ("factor",), ("factor", "bias")], ids=str)
def test_value_and_gradients__float64__equal_the_plain_formula(case, strategy, without, normed):
    leaves, fixed = case.problem()
    for name in without:
        del leaves[name]
    value, expected = case.ours(leaves, fixed, normed), case.plain(leaves, fixed, normed)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected)
    case.assert_equal(case.gradients(value, leaves), case.gradients(expected, leaves))


@pytest.mark.parametrize("normed", [False, True], ids=["scale", "magnitude"])
def test_gradcheck(case, strategy, normed):
    leaves, fixed = case.problem()

    def f(*tensors):
        return case.ours(dict(zip(NAMES, tensors, strict=True)), fixed, normed)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("wanted", [c for r in range(4) for c in itertools.combinations(NAMES, r)])
@pytest.mark.parametrize("name", ["keep", "blocks"])
def test_only_wanted_gradients__are_the_same(case, name, wanted):
    case.use(name)
    leaves, fixed = case.problem()
    expected = case.gradients(case.plain(leaves, fixed, normed=True), leaves)
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in wanted)
    value = case.ours(leaves, fixed, normed=True)
    assert value.requires_grad == bool(wanted)
    torch.testing.assert_close(value.detach(), case.plain(leaves, fixed, normed=True).detach())
    if wanted:
        value.backward()
    for key, leaf in leaves.items():
        assert (leaf.grad is not None) == (key in wanted)
        if key in wanted:
            torch.testing.assert_close(leaf.grad, expected[key])


def test_no_grad__gives_the_value(case, strategy):
    leaves, fixed = case.problem()
    with torch.no_grad():
        value = case.ours(leaves, fixed)
    assert not value.requires_grad
    torch.testing.assert_close(value, case.plain(leaves, fixed).detach())


def test_targets_that_do_not_sum_to_one__follow_the_formula(case, strategy):
    leaves, fixed = case.problem()
    fixed["targets"] = (
        fixed["targets"] * torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)[:, None]
    )
    value, expected = case.ours(leaves, fixed), case.plain(leaves, fixed)
    torch.testing.assert_close(value, expected)
    case.assert_equal(case.gradients(value, leaves), case.gradients(expected, leaves))


def test_defaults__are_the_mean_and_one_view_may_be_2d(case):
    leaves, fixed = case.problem(torch.float32)
    y, w, t, tau = leaves["embeddings"], leaves["weight"], fixed["targets"], case.sizes.tau
    pairs = [
        F.cross_entropy(view @ w.t() / tau, target)  # torch's own soft-target cross-entropy
        for view in y
        for target in t
    ]
    value = prototype_cross_entropy(y, w, t, temperature=tau)
    torch.testing.assert_close(value, torch.stack(pairs).mean())
    one = prototype_cross_entropy(y[0], w, t[0], temperature=tau)
    torch.testing.assert_close(one, pairs[0])


def test_memory_layout__does_not_matter(case, strategy):
    leaves, fixed = case.problem()
    strided = {
        "embeddings": leaves["embeddings"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "weight": leaves["weight"].detach().t().contiguous().t(),
        "factor": torch.stack([leaves["factor"].detach()] * 2, dim=1)[:, 0],
        "bias": torch.stack([leaves["bias"].detach()] * 2, dim=1)[:, 0],
    }
    strided = {k: v.requires_grad_() for k, v in strided.items()}
    value = case.ours(leaves, fixed)
    fixed["targets"] = fixed["targets"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    other = case.ours(strided, fixed)
    torch.testing.assert_close(other, value)
    case.assert_equal(case.gradients(other, strided), case.gradients(value, leaves))


def test_no_rows__is_zero_and_reaches_every_parameter(case):
    leaves, _ = case.problem(torch.float32)
    value = prototype_cross_entropy(
        leaves["embeddings"][:, :0],
        leaves["weight"],
        torch.zeros(case.sizes.Q, 0, case.sizes.K),
        temperature=case.sizes.tau,
        magnitude=leaves["factor"],
        bias=leaves["bias"],
    )
    assert value.item() == 0
    for grad in case.gradients(value, leaves).values():
        assert not grad.any()


# ---- what autograd may do with it ----------------------------------------------------------------


def test_scaled_loss_and_retained_graph__scale_and_repeat_the_gradients(case, strategy):
    leaves, fixed = case.problem()
    expected = case.gradients(3 * case.plain(leaves, fixed), leaves)
    loss = 3 * case.ours(leaves, fixed)
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
    sums = {name: leaf.grad / 3 for name, leaf in leaves.items()}
    case.assert_equal(sums, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradient_accumulation__keeps_the_first_gradients_intact(case, strategy):
    leaves, fixed = case.problem()
    for _ in range(2):
        case.ours(leaves, fixed).backward()
    expected = case.gradients(case.plain(leaves, fixed), leaves)
    case.assert_equal({name: leaf.grad / 2 for name, leaf in leaves.items()}, expected)


def test_second_derivative__is_refused(case, strategy):
    leaves, fixed = case.problem()
    grads = torch.autograd.grad(case.ours(leaves, fixed), list(leaves.values()), create_graph=True)
    case.assert_equal(
        dict(zip(leaves, grads, strict=True)), case.gradients(case.plain(leaves, fixed), leaves)
    )
    for grad in grads:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (grad.sum() + leaves["weight"].sum()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing__gives_the_same_gradients(case, strategy, reentrant):
    leaves, fixed = case.problem()

    def f(*tensors):
        return case.ours(dict(zip(NAMES, tensors, strict=True)), fixed)

    value = checkpoint(f, *leaves.values(), use_reentrant=reentrant)
    value.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    case.assert_equal(grads, case.gradients(case.plain(leaves, fixed), leaves))


def test_repeated__is_bitwise_equal(case, strategy):
    leaves, fixed = case.problem(torch.float32)
    runs = [case.gradients(case.ours(leaves, fixed), leaves) for _ in range(2)]
    case.assert_equal(*runs, rtol=0, atol=0)


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prototypes = Prototypes(5, 37, "vmf")

    def forward(self, y, targets):
        layer = self.prototypes
        return prototype_cross_entropy(
            y,
            layer.weight_v,
            targets,
            temperature=0.3,
            magnitude=layer.weight_g.squeeze(-1),
            bias=layer.log_normalizer(0.3),
        )


def _views(rank):
    generator = torch.Generator().manual_seed(rank)
    y = F.normalize(torch.randn(4, 3, 5, generator=generator), dim=-1)
    return y, torch.randn(2, 3, 37, generator=generator).softmax(dim=-1)


def _ddp_gradients(rank, keep):
    if not keep:
        module.choose_plan = lambda w, n, dtype, product: Plan(False, 5, 8, product, dtype)
    model = torch.nn.parallel.DistributedDataParallel(_Layer())
    model(*_views(rank)).backward()
    module.choose_plan = choose_plan
    return {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "blocks"])
def test_two_processes__average_their_gradients(case, ddp, keep):
    first, second = ddp(_ddp_gradients, keep)
    layer = _Layer()
    for rank in range(2):
        (layer(*_views(rank)) / 2).backward()
    case.assert_equal(first, {name: p.grad for name, p in layer.named_parameters()})
    case.assert_equal(first, second, rtol=0, atol=0)
