"""Kept memory: repeated steps ask the operating system for nothing, and no living tensor is overwritten."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.core.workspace import WORKSPACE, Workspace
from dinovmf_plugin.losses import prototype_cross_entropy

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for"
)
CPU = torch.device("cpu")
MEGA = 1 << 20  # float32 numbers: 4 MiB


def make(workspace: Workspace, count: int, value: float) -> torch.Tensor:
    return workspace.empty((count,), torch.float32, CPU).fill_(value)


def test_dead_tensors__give_their_memory_to_the_next():
    workspace = Workspace()
    for _ in range(5):
        first, second = make(workspace, MEGA, 1.0), make(workspace, 3 * MEGA, 2.0)
        assert first.mean() == 1
        assert second.mean() == 2
        del first, second
    assert workspace.mapped == 2


def test_views_and_storages__keep_a_block_alive():
    workspace = Workspace()
    view = make(workspace, 2 * MEGA, 1.0)[MEGA:].view(2, -1).t()
    storage = make(workspace, 2 * MEGA, 3.0).untyped_storage()
    other = make(workspace, 2 * MEGA, 2.0)
    assert workspace.mapped == 3
    assert view.unique().tolist() == [1]
    assert torch.empty(0).set_(storage).unique().tolist() == [3]
    assert other.unique().tolist() == [2]


def test_sizes_that_vary__end_with_a_few_blocks_that_serve_all():
    """iBOT masks another number of patches in every step."""
    workspace, generator = Workspace(), torch.Generator().manual_seed(0)
    for _ in range(60):
        a, b = (int(torch.randint(MEGA, 2 * MEGA, (), generator=generator)) for _ in range(2))
        kept = [make(workspace, a, 1.0), make(workspace, b, 2.0)]
        assert [float(x.mean()) for x in kept] == [1, 2]
        del kept
    # two live at once, and blocks of four sizes 1.25 apart reach from 4 to 8 MiB
    assert len(workspace._free) <= workspace.mapped <= 2 * 4 + 4


def test_idle_blocks__are_given_back():
    workspace = Workspace()
    make(workspace, 64 * MEGA, 0.0)
    for count in range(300):
        make(workspace, MEGA if count < 299 else 4 * MEGA, 0.0)
    assert sorted(len(block) // (4 * MEGA) for _, block in workspace._free) == [1, 4]


def test_gradient_in_use__survives_the_next_steps():
    """Gradient accumulation and optimizers hold on to what the loss handed out."""
    first = _step(seed=0)
    kept = {name: value.clone() for name, value in first.items()}
    for seed in (1, 2):
        _step(seed)
    for name, value in first.items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


def _step(seed: int) -> dict[str, torch.Tensor]:
    """Two losses whose graphs live at the same time, as iBOT has them."""
    generator = torch.Generator().manual_seed(seed)
    k, p = 16384, 64
    v = torch.randn(k, p, generator=generator).requires_grad_()
    rows = [
        F.normalize(torch.randn(views, n, p, generator=generator), dim=-1).requires_grad_()
        for views, n in ((8, 24), (1, 96))
    ]
    losses = []
    for y in rows:
        targets = torch.randn(1, y.shape[1], k, generator=generator).softmax(dim=-1)
        losses.append(prototype_cross_entropy(y, v, targets, temperature=0.1))
    torch.stack(losses).sum().backward()
    return {"v": v.grad, "cls": rows[0].grad, "patches": rows[1].grad}


def test_repeated_steps__map_nothing_new():
    for _ in range(2):
        _step(seed=0)
    mapped = WORKSPACE.mapped
    for seed in range(4):
        _step(seed)
    assert mapped > 0
    assert WORKSPACE.mapped == mapped
