"""Numbers that are read late are the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from dinovmf_plugin.training.late import LateNumber


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [-0.5, 0.0, math.inf])
def test_read__is_the_value_of_then(dtype, value):
    tensor = torch.tensor([value], dtype=dtype, requires_grad=True)
    late = LateNumber(tensor)
    assert late.read() == value


def test_read__nan():
    assert math.isnan(LateNumber(torch.tensor(math.nan)).read())


@pytest.mark.gpu
def test_gpu__no_wait_until_read():
    torch.cuda.set_sync_debug_mode("error")
    try:
        late = LateNumber(torch.ones(3, device="cuda").sum())
        assert late.read() == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
