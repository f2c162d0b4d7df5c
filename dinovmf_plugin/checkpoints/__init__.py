"""Weights in and out: official DINO, iBOT, MSN and solo-learn checkpoints; timm and safetensors."""

from dinovmf_plugin.checkpoints.heads import HeadSettings, load_head
from dinovmf_plugin.checkpoints.loading import initialize_from, load_backbone
from dinovmf_plugin.checkpoints.report import LoadReport

__all__ = ["HeadSettings", "LoadReport", "initialize_from", "load_backbone", "load_head"]
