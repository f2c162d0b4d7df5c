"""Whether Triton's kernels are used on a device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["triton_serves"]


def triton_serves(tensor: torch.Tensor) -> bool:
    """Whether kernels written in Triton may take ``tensor``: on CUDA, unless ``DINOVMF_TRITON=0``."""
    return tensor.is_cuda and os.environ.get("DINOVMF_TRITON", "1") != "0" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
