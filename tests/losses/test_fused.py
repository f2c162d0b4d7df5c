"""The fused cross-entropy: its kernels against the plain formula, and when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinovmf_plugin.losses import fused


def test_kernels__in_tritons_interpreter__equal_the_plain_formula():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-v", _CHECKS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


_CHECKS = str(Path(__file__).with_name("interpreted_fused.py"))


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
