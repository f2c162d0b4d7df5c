"""Counts of operations: what counts, what does not, and the published step's."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.data import DataLoader

from dinovmf_plugin.benchmarks import step, step_candidates
from dinovmf_plugin.benchmarks.launches import Launches, StepLaunches
from dinovmf_plugin.benchmarks.settings import StepSettings
from dinovmf_plugin.benchmarks.training import train_quietly


def test_launches__views_and_empty_memory_are_free_and_backward_counts():
    x, gradient = torch.ones(4, 3, requires_grad=True), torch.ones(12)
    with Launches() as counted:
        torch.empty(5)
        y = x.view(12).exp()
        y.backward(gradient)
    assert counted.operations["aten::exp"] == counted.operations["aten::mul"] == 1
    assert counted.total == 2, counted.operations  # exp, and its product with the gradient
    assert counted.waits == 0
    with Launches() as counted:
        bool(y.detach()[y.detach() > 0].sum() > 0)
    assert counted.waits == 2


def test_bf16_step_of_a_vit_s_with_12_crops_and_clipping__under_2000_launches():
    settings = StepSettings(batch=1, crops=10, size=64, prototypes=512, precision="bf16-mixed")
    module = step_candidates.build(settings, "dino_vmf")
    module.settings = dataclasses.replace(module.settings, clip_grad=3.0)
    assert len(module.backbone.blocks) == 12
    counted = StepLaunches()
    batches = DataLoader([step._batch(settings)] * 3, batch_size=None)
    train_quietly(module, batches, counted, accelerator="cpu", precision="bf16-mixed")
    assert 500 < counted.total < 2000, counted.operations
    assert counted.waits == 0
