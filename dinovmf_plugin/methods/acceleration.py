"""``performance.compile`` and ``performance.grad_checkpointing``: other speed or memory, equal values."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin.core import vit as vits
from dinovmf_plugin.core.packing import can_pack, packed_block

__all__ = ["check_acceleration", "compile_networks", "use_grad_checkpointing", "wants"]


def wants(cfg: DictConfig, switch: str) -> bool:
    """Whether ``performance.<switch>`` is on."""
    return bool(OmegaConf.select(cfg, f"performance.{switch}", default=False))


def check_acceleration(cfg: DictConfig) -> None:
    """Refuse what cannot work, before anything is built.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right.
    """
    if wants(cfg, "grad_checkpointing") and not cfg.backbone.name.startswith("vit_"):
        raise ValueError(
            f"performance.grad_checkpointing=True needs a Vision Transformer, but backbone.name is "
            f"{cfg.backbone.name}: set it to False or choose vit_tiny, vit_small, vit_base or vit_large"
        )
    if not wants(cfg, "compile"):
        return
    accelerator = OmegaConf.select(cfg, "accelerator", default="auto") or "auto"
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "performance.compile=True needs the package triton on a GPU: pip install triton, or set it "
            "to False"
        )
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not on_gpu and not any(map(shutil.which, compilers)):
        raise ValueError(
            "performance.compile=True needs a C++ compiler on a CPU, and there is neither g++ nor "
            "clang++: install one, or set it to False"
        )


def use_grad_checkpointing(backbone: Any) -> None:
    """Compute each block's activations again in the backward pass instead of keeping them."""
    backbone.set_grad_checkpointing(True)


def compile_networks(*networks: nn.Module) -> None:
    """Compile the blocks of ViTs, and other networks whole, in place.

    Parameters, their names and the modules' classes stay what they are. All blocks of one width share
    the same code, so that the time to compile does not grow with the depth.

    Args:
        networks: backbones and heads.
    """
    for network in networks:
        if not vits.is_vit(network):
            _compile(network)
        elif not can_pack(network):
            for block in network.blocks:  # type: ignore[union-attr]
                _compile(block)
        elif getattr(network, "packed_block", None) is None:
            network.packed_block = torch.compile(packed_block)  # type: ignore[assignment]


def _compile(module: nn.Module) -> None:
    """Once, however often training begins."""
    if module._compiled_call_impl is None:
        module.compile()
