"""The cross-entropy as one autograd function: what is computed when, on any device.

With logits ``l_i = W y_i + b``, student rows ``i`` and teacher rows ``j``, the loss
``sum_ij c_ij (sum_k t_jk lse(l_i) - <t_j, l_i>)`` is linear but for one log-sum-exp per student row:

* targets are added up first: ``sum_ij c_ij <t_j, l_i> = sum_j <W ybar_j + m_j b, t_j>`` with
  ``ybar_j = sum_i c_ij y_i`` and ``m_j = sum_i c_ij``: products of as many rows as the teacher has,
  not one per pair of views;
* ``d loss / d l_i = a_i softmax(l_i) - targets`` with ``a_i = sum_j c_ij sum_k t_jk``, so
  ``exp(l - shift)`` is computed once per logit, while its chunk is in cache.

``passes`` has the loops over chunks of prototypes, ``plan`` their sizes, ``workspace`` their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinovmf_plugin.core.workspace import room
from dinovmf_plugin.losses.passes import Passes, Problem, PrototypeGradients
from dinovmf_plugin.losses.plan import Plan

__all__ = ["StreamedCrossEntropy", "refuse_second_derivative"]

# Tells whether the running backward pass keeps its graph (retain_graph=True); used if torch has it.
_GRAPH_IS_KEPT = "_get_current_graph_task_keep_graph"


class StreamedCrossEntropy(torch.autograd.Function):
    """The value, with gradients of embeddings, weight, factor and bias.

    The loss is a scalar: its gradients are known up to one number after the forward pass. Those that
    need no waiting exponentials are formed there and multiplied by that number in the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        pair_weights: Tensor,
        row_weights: Tensor,
        temperature: float,
        normed: bool,
        plan: Plan,
        grad_enabled: bool,
    ) -> Tensor:
        """The scalar; arguments as in ``prototype_cross_entropy``, ``factor`` is scale or magnitude."""
        with torch.autocast(weight.device.type, enabled=False):
            needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
            k, dim = weight.shape
            views = embeddings.to(pair_weights.dtype) / temperature
            y = views.reshape(-1, dim)
            scale, norms = factor, None
            if normed and factor is not None:
                norms = torch.linalg.vector_norm(weight, dim=1, dtype=y.dtype).clamp_min_(1e-12)
                scale = factor / norms
            problem = Problem(y, weight, scale, norms, bias, targets.reshape(-1, k))
            passes = Passes(problem, plan)
            mixed = torch.einsum("vq,n,vnp->qnp", pair_weights, row_weights, views)
            mixed = mixed.reshape(-1, dim)
            mass = (pair_weights.sum(0)[:, None] * row_weights).reshape(-1)
            sums = targets.sum(dim=-1, dtype=y.dtype)
            share = ((pair_weights @ sums) * row_weights).reshape(-1)

            store = any(needs[1:])
            rows = plan.rows if store else len(y)
            buffer = room((k * rows,), plan.stored, y.device) if store else None
            mean = torch.zeros_like(y) if needs[0] else None
            target_mean = torch.zeros_like(mixed)
            grads = PrototypeGradients(problem, needs[1:]) if store and not plan.keep else None
            value = y.new_zeros(())
            for lo in range(0, len(y), rows):
                hi = min(lo + rows, len(y))
                stored = None if buffer is None else buffer[: k * (hi - lo)].view(k, -1)
                lse, shifts = passes.normalize(
                    y[lo:hi],
                    stored,
                    None if mean is None else mean[lo:hi],
                    target_mean if lo == 0 else None,
                )
                value += torch.dot(share[lo:hi], lse)
                if stored is None:
                    continue
                factors = (shifts - lse).exp_().mul_(share[lo:hi])
                if grads is not None:
                    ends = {"first": lo == 0, "last": hi == len(y)}
                    passes.add_gradients(grads, y[lo:hi], stored, factors, mixed, mass, **ends)
            value -= torch.dot(mixed.view(-1), target_mean.view(-1))
            if bias is not None:
                value -= torch.dot(mass, torch.mv(problem.targets.to(y.dtype), bias))

            grad_y = None
            if mean is not None:
                teacher = target_mean.view(targets.shape[0], -1, dim)
                pulled = torch.einsum("vq,n,qnp->vnp", pair_weights, row_weights, teacher)
                grad_y = mean.mul_(share[:, None]).view_as(views).sub_(pulled).div_(temperature)
            ctx.needs, ctx.plan = needs, plan
            ctx.dtypes = [
                None if x is None else x.dtype for x in (embeddings, weight, factor, bias)
            ]
            ctx.ready = None
            if store and plan.keep:
                inputs = (y, weight, scale, norms, bias, problem.targets)
                ctx.save_for_backward(grad_y, *inputs, stored, factors, mixed, mass)
            elif any(needs):
                ctx.ready = [grad_y, *([None] * 3 if grads is None else grads.wanted())]
            return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the first four arguments."""
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if any(ctx.needs[1:]) and ctx.plan.keep:
                grad_y, y, weight, *rest, stored, factors, mixed, mass = ctx.saved_tensors
                problem = Problem(y, weight, *rest)
                grads = PrototypeGradients(problem, ctx.needs[1:])
                Passes(problem, ctx.plan).add_gradients(
                    grads, y, stored, factors * grad, mixed * grad, mass * grad
                )
                out = [None if grad_y is None else grad_y * grad, *grads.wanted()]
            else:
                out = _multiplied(ctx, grad)
            out = [
                None if g is None else g.to(dtype) for g, dtype in zip(out, ctx.dtypes, strict=True)
            ]
        return (*refuse_second_derivative(out), *([None] * 7))


def _multiplied(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """``ctx.ready`` times ``grad``: in place, unless the graph is kept for another backward pass."""
    ready, is_kept = ctx.ready, getattr(torch._C._autograd, _GRAPH_IS_KEPT, None)
    if ready is None:
        raise RuntimeError(
            "backward through prototype_cross_entropy a second time: "
            "give retain_graph=True to the first backward pass"
        )
    if is_kept is None or is_kept():
        return [None if g is None else g * grad for g in ready]
    ctx.ready = None
    return [None if g is None else g.mul_(grad) for g in ready]


def refuse_second_derivative(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients; with ``create_graph=True``, differentiating them is an error, not silently 0."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _FirstDerivative.apply(g.requires_grad_()) for g in gradients]


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient on."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("prototype_cross_entropy has no second derivative")
