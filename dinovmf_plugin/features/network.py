"""The frozen network under evaluation: a checkpoint, or a baseline without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from dinovmf_plugin.checkpoints.architecture import ViTShape
from dinovmf_plugin.checkpoints.layouts import Which, read_weights
from dinovmf_plugin.checkpoints.loading import backbone_from
from dinovmf_plugin.checkpoints.reading import resolve_file
from dinovmf_plugin.data.channels import IMAGENET, Statistics, channel_statistics
from dinovmf_plugin.features.extraction import PixelFeatures
from dinovmf_plugin.report.paper import method_label
from dinovmf_plugin.runs.files import file_digest

__all__ = ["EvaluatedBackbone", "load_evaluated", "random_name", "untrained_like"]

_PIXEL_SIZE = 32


@dataclass(frozen=True)
class EvaluatedBackbone:
    """A network and where it came from.

    Attributes:
        model: maps images to features, see ``features.backbone_features``.
        label: short name for tables, such as ``DINO-vMF`` or ``untrained``.
        identity: what distinguishes its features from those of any other network.
        record: what the results say about it: path, sha256, network, architecture, load report.
        shape: the ViT's shape, None for pixels.
        statistics: what its images are normalised by.
    """

    model: nn.Module
    label: str
    identity: str
    record: dict[str, Any]
    shape: ViTShape | None = None
    statistics: Statistics = IMAGENET


def _random_vit(build: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build()
    return model.eval()


def untrained_like(backbone: EvaluatedBackbone, seed: int = 0) -> EvaluatedBackbone:
    """The same architecture with random weights, for the same pixels: what the images alone give.

    Raises:
        ValueError: if ``backbone`` is no ViT.
    """
    shape = backbone.shape
    if shape is None:
        raise ValueError(f"{backbone.label} is no Vision Transformer: it has no untrained twin")
    identity = f"untrained {shape} seed {seed}"
    model = _random_vit(lambda: VisionTransformer(num_classes=0, **shape.model_args), seed)
    record = {"checkpoint": identity}
    return EvaluatedBackbone(model, "untrained", identity, record, shape, backbone.statistics)


def _pixels(size: int) -> EvaluatedBackbone:
    identity = f"pixels {size}x{size}"
    return EvaluatedBackbone(PixelFeatures(size), "pixels", identity, {"checkpoint": identity})


def random_name(checkpoint: str) -> str:
    """timm's name in ``random:NAME``.

    Raises:
        ValueError: if timm has no Vision Transformer of that name.

    Example:
        >>> random_name("random:vit_tiny_patch16_224")
        'vit_tiny_patch16_224'
    """
    name = checkpoint.removeprefix("random:")
    if name not in timm.list_models("vit_*") + timm.list_models("deit_*"):
        raise ValueError(
            f"checkpoint=random:{name} names no Vision Transformer of timm, such as "
            "random:vit_tiny_patch16_224"
        )
    return name


def _random_by_name(name: str, seed: int) -> EvaluatedBackbone:
    model = _random_vit(lambda: timm.create_model(name, num_classes=0), seed)
    identity = f"untrained {name} seed {seed}"
    return EvaluatedBackbone(model, "untrained", identity, {"checkpoint": identity})


def load_evaluated(
    checkpoint: str | None,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    seed: int = 0,
) -> EvaluatedBackbone:
    """The network that ``checkpoint`` names.

    Args:
        checkpoint: path of any weight file that ``checkpoints.load_backbone`` reads;
            ``random:NAME`` for timm's untrained ViT of that name; ``pixels`` for raw pixels.
        which: ``teacher`` or ``student``.
        model_name: see ``load_backbone``.
        num_heads: see ``load_backbone``.
        seed: of the random weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file or a name cannot be used.

    Example:
        >>> load_evaluated("pixels").identity
        'pixels 32x32'
    """
    if not checkpoint:
        raise ValueError(
            f"checkpoint={checkpoint!r} must be set: a weight file, random:TIMM_NAME or pixels"
        )
    if which not in ("teacher", "student"):
        raise ValueError(f"which={which!r} must be teacher or student")
    if checkpoint == "pixels":
        return _pixels(_PIXEL_SIZE)
    if checkpoint.startswith("random:"):
        return _random_by_name(random_name(checkpoint), seed)
    file = resolve_file(checkpoint)
    stored = read_weights(file, which)
    model, report, shape = backbone_from(stored, model_name=model_name, num_heads=num_heads)
    digest = file_digest(file)
    record = {
        "checkpoint": str(file),
        "sha256": digest,
        "layout": report.source,
        "which": report.which,
        "architecture": report.model_name,
        "load_report": str(report),
    }
    identity = f"sha256 {digest} {report.which} {shape}"
    return EvaluatedBackbone(
        model,
        method_label(stored.config, stored.source),
        identity,
        record,
        shape,
        channel_statistics(stored.config),
    )
