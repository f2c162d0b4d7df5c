"""A small problem for prototype_cross_entropy, its plain formula, and every way to compute it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.losses import cross_entropy as module
from dinovmf_plugin.losses import passes, prototype_cross_entropy
from dinovmf_plugin.losses.plan import Plan, choose_plan
from dinovmf_plugin.losses.reference import reference_cross_entropy

V, Q, N, P, K, TAU = 4, 2, 3, 5, 37, 0.3
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


def _use_strategy(monkeypatch, name, operand=None):
    keep, rows, columns, safe = SHAPES[name]

    def plan(weight, total, dtype, product):
        chosen = choose_plan(weight, total, dtype, product)
        return Plan(keep, rows, columns, product, operand or chosen.operand)

    monkeypatch.setattr(module, "choose_plan", plan)
    monkeypatch.setattr(passes, "_SAFE", safe)


def _problem(dtype=torch.float64, seed=0):
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


def _call(function, leaves, fixed, normed):
    return function(
        leaves["embeddings"],
        leaves["weight"],
        fixed["targets"],
        temperature=TAU,
        bias=leaves.get("bias"),
        pair_weights=fixed["pair_weights"],
        row_weights=fixed["row_weights"],
        **{"magnitude" if normed else "scale": leaves.get("factor")},
    )


def _plain(leaves, fixed, normed=False):
    return _call(reference_cross_entropy, leaves, fixed, normed)


def _ours(leaves, fixed, normed=False):
    return _call(prototype_cross_entropy, leaves, fixed, normed)


def _term_by_term(leaves, fixed, normed=False):
    """The definition, one pair of views and one image after the other."""
    w, factor = leaves["weight"], leaves["factor"]
    w = (factor / w.square().sum(dim=1).sqrt() if normed else factor)[:, None] * w
    logits = leaves["embeddings"] @ w.t() / TAU + leaves["bias"]
    value = torch.zeros((), dtype=logits.dtype)
    for v, q, n in itertools.product(range(V), range(Q), range(N)):
        ce = logits[v, n].exp().sum().log() - fixed["targets"][q, n] @ logits[v, n]
        value = value + fixed["pair_weights"][v, q] * fixed["row_weights"][n] * ce
    return value


def _gradients(value, leaves):
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def _assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.fixture
def case(monkeypatch):
    """Sizes, and the functions above without their underscores."""

    def use(name, operand=None):
        _use_strategy(monkeypatch, name, operand)

    return SimpleNamespace(
        sizes=SimpleNamespace(V=V, Q=Q, N=N, P=P, K=K, tau=TAU),
        shapes=SHAPES,
        problem=_problem,
        plain=_plain,
        term_by_term=_term_by_term,
        ours=_ours,
        gradients=_gradients,
        assert_equal=_assert_equal,
        use=use,
    )


@pytest.fixture(params=SHAPES)
def strategy(request, case):
    """Every strategy in turn."""
    case.use(request.param)
    return request.param


@pytest.fixture(params=[*(name for name in SHAPES if "bounded" not in name), "chosen"])
def any_size_strategy(request, case):
    """Every strategy that is right for logits of any size, and the chosen one."""
    if request.param != "chosen":
        case.use(request.param)
    return request.param
