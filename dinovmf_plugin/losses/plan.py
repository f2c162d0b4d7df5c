"""How to walk through (student rows) x K logits: sizes of blocks and chunks, dtypes of operands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Plan", "choose_plan", "multiplies_natively"]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """How to walk through the (student rows) x K logits.

    The exponentials wait for their rows' normalizers before they can give the prototypes' gradients:
    until the backward pass (``keep``, one block), or for the end of their block of student rows.
    """

    keep: bool
    rows: int  # student rows of one block
    columns: int  # prototypes of one chunk
    stored: torch.dtype  # of waiting exponentials
    operand: torch.dtype  # of the operands of products


def choose_plan(weight: Tensor, rows: int, dtype: torch.dtype, product: torch.dtype) -> Plan:
    """Strategy and sizes for ``rows`` student rows, sums in ``dtype``, products in ``product``.

    On a CPU one block takes at most 96 MiB (or the memory of the prototypes' own gradient) and one
    chunk 8 MiB: smaller ones are no faster on an idle machine, and slower on a busy one, where threads
    wait for each other after every operation. Elsewhere, too, launches are what counts.
    """
    num_prototypes, dim = weight.shape
    device = weight.device.type
    block, chunk = (3 << 23, 1 << 21) if device == "cpu" else (1 << 28, 1 << 26)
    blocks = math.ceil(rows / max(block // num_prototypes, dim))
    block_rows = math.ceil(rows / blocks)
    chunks = math.ceil(num_prototypes / max(chunk // max(block_rows, dim), 256))
    columns = min(math.ceil(num_prototypes / chunks / 64) * 64, num_prototypes)
    operand = product if multiplies_natively(product, device) else dtype
    return Plan(blocks == 1, block_rows, columns, product, operand)


def multiplies_natively(dtype: torch.dtype, device: str) -> bool:
    """Whether to multiply in this dtype: a CPU without it is faster, and more exact, in float32."""
    if dtype not in _HALF or device != "cpu":
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return dtype == torch.bfloat16 and supported is not None and bool(supported())
