"""The fused cross-entropy: its kernels against the plain formula, and when they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinovmf_plugin.losses import fused
from tests.interpreted import assert_passes_interpreted


def test_kernels__in_tritons_interpreter__equal_the_plain_formula():
    assert_passes_interpreted(_CHECKS)


_CHECKS = Path(__file__).with_name("interpreted_fused.py")


def test_shares__cover_all_prototypes_and_none_is_empty():
    tiles = fused.Tiles()
    for rows in (1, 64, 768, 5000):
        for count in (1, 63, 1000, 65536):
            shares, each = tiles.shares(rows, count)
            total = -(-count // tiles.prototypes)
            assert shares * each >= total > (shares - 1) * each


# ---- when it is used -----------------------------------------------------------------------------


class OnGpu:
    """Says of itself what a CUDA tensor would."""

    def __init__(self, dim=256, is_cuda=True):
        self.is_cuda, self.shape, self.device = is_cuda, (8, dim), "cuda"


@pytest.mark.parametrize(
    ("weight", "operand", "environment", "expected"),
    [
        (OnGpu(), torch.bfloat16, {}, True),
        (OnGpu(), torch.bfloat16, {"DINOVMF_TRITON": "1"}, True),
        (OnGpu(), torch.bfloat16, {"DINOVMF_TRITON": "0"}, False),
        (OnGpu(), torch.float32, {}, False),
        (OnGpu(), torch.float16, {}, False),
        (OnGpu(dim=384), torch.bfloat16, {}, False),
        (OnGpu(is_cuda=False), torch.bfloat16, {}, False),
    ],
)
def test_serves(monkeypatch, weight, operand, environment, expected):
    monkeypatch.delenv("DINOVMF_TRITON", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fused, "_shared_memory", lambda device: 232_448)  # H100
    assert fused.serves(weight, operand) is expected
    monkeypatch.setattr(fused, "_shared_memory", lambda device: 101_376)  # RTX 4090
    assert not fused.serves(weight, operand)
