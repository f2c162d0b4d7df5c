"""DINO's loss with every normalization and centering: against lightly, and against slow numpy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from scipy import special
from torch.nn import functional as F

from dinovmf_plugin.core.centering import Centering, make_centering
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.losses.dino import dino_loss, view_pairs

TAU_S, TAU_T = 0.1, 0.05


def _step(
    student: torch.Tensor,
    prototypes: Prototypes,
    teacher: torch.Tensor,
    teacher_prototypes: Prototypes,
    centering: Centering,
) -> torch.Tensor:
    """What a method does with the embeddings of one batch: ``(V, B, p)`` and ``(Q, B, p)``."""
    scores = teacher_prototypes.scores(teacher.flatten(0, 1))
    normalizer = teacher_prototypes.log_normalizer(TAU_T)
    targets = centering(scores, TAU_T, normalizer)
    centering.update(scores, TAU_T, normalizer)
    return dino_loss(student, prototypes, targets.unflatten(0, (len(teacher), -1)), TAU_S)


# ---- lightly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["none", "l2"])
@pytest.mark.parametrize("local_crops", [0, 1, 6])
def test_none_and_l2_with_logit_centering__equal_lightly(normalization, local_crops):
    """Value, center, and every parameter of the head after each of two optimizer steps."""
    torch.manual_seed(0)
    views, batch, k = 2 + local_crops, 4, 40
    frozen = normalization == "l2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_teacher = (
            DINOProjectionHead(12, 20, 8, k, norm_last_layer=frozen) for _ in range(2)
        )
    ours, our_teacher = (DINOHead(12, 20, 8, k, normalization) for _ in range(2))
    if not frozen:
        torch.nn.init.uniform_(theirs.last_layer.weight_g, 0.5, 2)
        torch.nn.init.uniform_(their_teacher.last_layer.weight_g, 0.5, 2)

    def same_order(head: DINOProjectionHead) -> dict[str, torch.Tensor]:
        state = head.state_dict()
        layers = [v for name, v in state.items() if name.startswith("layers.")]
        names = list(ours.mlp.state_dict(prefix="mlp."))
        last = {n: state[n] for n in ("last_layer.weight_v", "last_layer.weight_g")}
        return {**dict(zip(names, layers, strict=True)), **last}

    ours.load_state_dict(same_order(theirs))
    our_teacher.load_state_dict(same_order(their_teacher))
    assert ours.last_layer.weight_g.requires_grad is theirs.last_layer.weight_g.requires_grad

    criterion = DINOLoss(k, teacher_temp=TAU_T, student_temp=TAU_S, warmup_teacher_temp_epochs=0)
    centering = make_centering("logit", k)
    optimizers = [torch.optim.AdamW(h.parameters(), lr=0.01, eps=1e-4) for h in (theirs, ours)]
    for _ in range(2):
        x, x_teacher = torch.randn(views, batch, 12), torch.randn(2, batch, 12)
        with torch.no_grad():
            teacher_out = [their_teacher(view) for view in x_teacher]
        their_loss = criterion(teacher_out, [theirs(view) for view in x])
        with torch.no_grad():
            y_teacher = our_teacher(x_teacher)
        our_loss = _step(ours(x), ours.last_layer, y_teacher, our_teacher.last_layer, centering)
        torch.testing.assert_close(our_loss, their_loss)
        torch.testing.assert_close(centering.center, criterion.center[0])
        for loss, optimizer in zip((their_loss, our_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = same_order(theirs)
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- numpy ---------------------------------------------------------------------------------------

P, K, B, V = 32, 10, 3, 4


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def _log_normalizer(kappa: float, p: int) -> float:
    """log C_p(kappa) - log C_p(0)."""
    nu = p / 2 - 1
    log_bessel = np.log(special.ive(nu, kappa)) + kappa
    log_c = nu * np.log(kappa) - p / 2 * np.log(2 * np.pi) - log_bessel
    log_area = np.log(2) + p / 2 * np.log(np.pi) - special.gammaln(p / 2)
    return log_c + log_area


def _logits(y: np.ndarray, v: np.ndarray, g: np.ndarray, tau: float, use_vmf: bool) -> np.ndarray:
    """Logits of one vector, prototype by prototype (Eqs. 3 and 6)."""
    out = np.empty(len(v))
    for k in range(len(v)):
        w = g[k] * v[k] / np.linalg.norm(v[k])
        out[k] = w @ y / tau
        if use_vmf:
            out[k] += _log_normalizer(np.linalg.norm(w) / tau, len(y))
    return out


class _Reference:
    """The whole loss as the paper writes it: one image, one pair of views, one prototype at a time."""

    def __init__(self, normalization: str, centering: str) -> None:
        self.use_vmf, self.centering = normalization == "vmf", centering
        self.c = np.zeros(K)

    def targets(self, teacher: np.ndarray, v: np.ndarray, g: np.ndarray) -> np.ndarray:
        rows = [_logits(y, v, g, TAU_T, self.use_vmf) for y in teacher.reshape(-1, P)]
        logits = np.array(rows)
        if self.centering == "sinkhorn":
            q = np.exp(logits - logits.max())
            for _ in range(3):
                q = q / q.sum(axis=0) / K
                q = q / q.sum(axis=1, keepdims=True) / len(q)
            out = q / q.sum(axis=1, keepdims=True)
        elif self.centering == "probability":
            out = np.exp([_log_softmax(row - self.c) for row in logits])
            usage = np.mean([np.exp(_log_softmax(row)) for row in logits], axis=0)
            self.c = 0.9 * self.c + 0.1 * np.log(usage)
        elif self.use_vmf:
            out = np.exp([_log_softmax(row - self.c) for row in logits])
            self.c = 0.9 * self.c + 0.1 * logits.mean(axis=0)
        else:
            scores = logits * TAU_T
            out = np.exp([_log_softmax((row - self.c) / TAU_T) for row in scores])
            self.c = 0.9 * self.c + 0.1 * scores.mean(axis=0)
        return out.reshape(*teacher.shape[:2], K)

    def loss(self, y: np.ndarray, v: np.ndarray, g: np.ndarray, targets: np.ndarray) -> float:
        total, terms = 0.0, 0
        for q in range(len(targets)):
            for view in range(len(y)):
                if view == q:
                    continue
                ce = [
                    -targets[q, b] @ _log_softmax(_logits(y[view, b], v, g, TAU_S, self.use_vmf))
                    for b in range(B)
                ]
                total, terms = total + np.mean(ce), terms + 1
        return total / terms


def _directional(f: Callable[[np.ndarray], float], x: np.ndarray, d: np.ndarray) -> float:
    return (f(x + 1e-5 * d) - f(x - 1e-5 * d)) / 2e-5


@pytest.mark.parametrize("centering_name", ["logit", "probability", "sinkhorn"])
@pytest.mark.parametrize("normalization", ["none", "l2", "vmf"])
def test_every_cell__two_steps__values_and_gradients_equal_numpy(normalization, centering_name):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    prototypes, teacher = (Prototypes(P, K, normalization, order=2) for _ in range(2))
    if normalization != "l2":
        torch.nn.init.uniform_(prototypes.weight_g, 0.5, 3)
        torch.nn.init.uniform_(teacher.weight_g, 0.5, 3)
    centering = make_centering(centering_name, K)
    reference = _Reference(normalization, centering_name)
    v, g, v_t, g_t = (
        t.detach().double().numpy()
        for t in (
            prototypes.weight_v,
            prototypes.weight_g[:, 0],
            teacher.weight_v,
            teacher.weight_g[:, 0],
        )
    )
    values = []
    for step in range(2):
        y = F.normalize(torch.randn(V, B, P), dim=-1).requires_grad_()
        y_teacher = F.normalize(torch.randn(2, B, P), dim=-1)
        prototypes.zero_grad()
        loss = _step(y, prototypes, y_teacher, teacher, centering)
        loss.backward()

        targets = reference.targets(y_teacher.double().numpy(), v_t, g_t)
        y64 = y.detach().double().numpy()
        expected = reference.loss(y64, v, g, targets)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(centering.center[0].numpy(), reference.c, rtol=1e-4, atol=1e-5)
        values.append(expected)

        def check(x: np.ndarray, gradient: torch.Tensor, f: Callable[[np.ndarray], float]) -> None:
            for _ in range(2):
                d = rng.standard_normal(x.shape)
                ours = float((gradient.double().numpy() * d).sum())
                assert ours == pytest.approx(_directional(f, x, d), rel=2e-3, abs=2e-5), step

        check(y64, y.grad, lambda x: reference.loss(x, v, g, targets))
        check(v, prototypes.weight_v.grad, lambda x: reference.loss(y64, x, g, targets))
        if normalization == "l2":
            assert prototypes.weight_g.grad is None
        else:
            grad_g = prototypes.weight_g.grad[:, 0]
            check(g, grad_g, lambda x: reference.loss(y64, v, x, targets))
        assert all(p.grad is None for p in teacher.parameters())
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("centering_name", ["logit", "probability"])
def test_vmf_at_initialization__equals_none(centering_name):
    """All magnitudes 1: the normalizer is one constant, which softmax and center do not see."""
    losses, gradients = [], []
    for normalization in ("none", "vmf"):
        torch.manual_seed(0)
        prototypes, teacher = (Prototypes(256, 50, normalization) for _ in range(2))
        y = F.normalize(torch.randn(5, 3, 256), dim=-1).requires_grad_()
        y_teacher = F.normalize(torch.randn(2, 3, 256), dim=-1)
        centering = make_centering(centering_name, 50)
        loss = _step(y, prototypes, y_teacher, teacher, centering)
        loss.backward()
        losses.append(loss.detach())
        gradients.append((y.grad, prototypes.weight_v.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_uniform_student__loss_is_log_k():
    """The fingerprint of a collapse that users report as 'loss stuck at 11.09'."""
    prototypes = Prototypes(8, 100)
    torch.nn.init.zeros_(prototypes.weight_g)
    targets = torch.randn(2, 4, 100).softmax(-1)
    y = F.normalize(torch.randn(6, 4, 8), dim=-1)
    assert dino_loss(y, prototypes, targets, 0.1).item() == pytest.approx(np.log(100), rel=1e-6)


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "terms"), [(2, 2), (10, 18), (12, 22)])
def test_view_pairs__every_pair_but_the_same_view(views, terms):
    pairs = view_pairs(2, views)
    assert pairs.shape == (views, 2)
    assert int((pairs > 0).sum()) == terms
    assert pairs[0, 0] == pairs[1, 1] == 0
    torch.testing.assert_close(pairs[pairs > 0], torch.full((terms,), 1 / terms))


def test_view_pairs__single_view__named():
    with pytest.raises(ValueError, match=r"1 student and 1 teacher views leave no pair"):
        view_pairs(1, 1)
