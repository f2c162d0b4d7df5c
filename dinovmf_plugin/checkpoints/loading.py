"""Weights into a timm Vision Transformer, or another network that timm has by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from dinovmf_plugin.checkpoints.architecture import (
    ViTShape,
    build_vit,
    infer_shape,
    known_heads,
    resize_position_embedding,
)
from dinovmf_plugin.checkpoints.heads import with_head
from dinovmf_plugin.checkpoints.layouts import StoredWeights, Which, read_weights
from dinovmf_plugin.checkpoints.named import NamedShape, named_shape
from dinovmf_plugin.checkpoints.report import LoadReport
from dinovmf_plugin.checkpoints.vit_arguments import arguments_of, told_arguments
from dinovmf_plugin.core import vit as backbones

__all__ = ["backbone_from", "initialize_from", "load_backbone", "load_into", "network_from"]


def _fit(
    module: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Split tensors into (fitting, missing names, unexpected names, mismatched descriptions)."""
    own = module.state_dict()
    fitting, mismatched = {}, []
    for name, value in tensors.items():
        if name not in own:
            continue
        if value.shape == own[name].shape:
            fitting[name] = value
        else:
            mismatched.append(
                f"{name} (file {tuple(value.shape)}, network {tuple(own[name].shape)})"
            )
    missing = tuple(name for name in own if name not in tensors)
    unexpected = tuple(name for name in tensors if name not in own)
    return fitting, missing, unexpected, tuple(mismatched)


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{path} holds inf or nan in {name}: the training that wrote it diverged"
            )


def load_into(
    stored: StoredWeights, module: nn.Module, tensors: Mapping[str, Tensor], model_name: str
) -> LoadReport:
    """Copy the tensors; refuse what would leave the features other than those of the stored network."""
    fitting, missing, unexpected, mismatched = _fit(module, tensors)
    report = LoadReport(
        path=stored.path,
        source=stored.source,
        which=stored.which,
        model_name=model_name,
        matched=tuple(fitting),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
    )
    if misfits := report.misfits():
        raise ValueError(
            f"{stored.path} was refused: {misfits}; with {report.coverage:.1%} of the tensors of "
            f"{model_name} the features would be those of another network"
        )
    _check_finite(stored.path, fitting)
    module.load_state_dict(fitting, strict=False)
    return report


def backbone_from(
    stored: StoredWeights,
    *,
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> tuple[VisionTransformer, LoadReport, ViTShape]:
    """``load_backbone`` for the weights of a ViT that are read already, with the shape; same errors."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    try:
        shape = infer_shape(
            stored.backbone,
            stored.config,
            model_name=model_name,
            num_heads=num_heads,
            img_size=size,
        )
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error
    vit = build_vit(shape)
    backbones.resample_positions_as(vit, stored.position_resampling)
    report = load_into(stored, vit, stored.backbone, str(shape))
    if size is not None:
        resized = replace(
            shape, grid=(size[0] // shape.patch_size[0], size[1] // shape.patch_size[1])
        )
        if resized.img_size != tuple(size):
            raise ValueError(
                f"img_size={img_size} is no multiple of the patch size "
                f"{shape.patch_size[0]}x{shape.patch_size[1]}"
            )
        if resized.grid != shape.grid:
            state = vit.state_dict() | {"pos_embed": resize_position_embedding(vit, size)}
            vit = build_vit(resized)
            backbones.resample_positions_as(vit, stored.position_resampling)
            vit.load_state_dict(state)
            old, shape = shape.grid, resized
            report = replace(report, model_name=str(resized), resized=(old, shape.grid))
    return vit.eval(), report, shape


def network_from(
    stored: StoredWeights,
    *,
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> tuple[nn.Module, LoadReport, ViTShape | NamedShape]:
    """``load_backbone`` for weights that are read already, with the shape; same errors."""
    try:
        shape = named_shape(stored.backbone, stored.config)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error
    if shape is None:
        return backbone_from(stored, model_name=model_name, num_heads=num_heads, img_size=img_size)
    if img_size is not None:
        raise ValueError(
            f"img_size={img_size} is for Vision Transformers, whose position embeddings it resamples, but "
            f"{stored.path} holds {shape.name}"
        )
    model = shape.build()
    return model.eval(), load_into(stored, model, stored.backbone, str(shape)), shape


def load_backbone(
    path: str | Path,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> tuple[Any, LoadReport]:
    """Load a Vision Transformer from any layout that this project knows.

    Official DINO, iBOT, MSN and DINOv2 checkpoints (full or backbone-only), solo-learn's and this plugin's
    ``.ckpt``, bare timm state dicts, ``.safetensors`` files and exported folders. The architecture is
    inferred from the tensors; ResNets, ConvNeXts and Swins are built as the file's config says. Nothing that
    a file contains is executed.

    Args:
        path: the file, or a folder with ``model.safetensors``.
        which: ``teacher`` (the EMA network, which the papers evaluate) or ``student``. Ignored by
            files that hold one nameless network; the report then says ``unnamed``.
        model_name: ``vit_tiny`` .. ``vit_huge``, when the number of heads cannot be inferred.
        num_heads: number of attention heads, for other sizes.
        img_size: pixels of a side (or height, width) to resample the position embeddings for. Not
            needed for ``backbones.forward_tokens``, which takes any size. A bare state dict that has as
            many position embeddings as this size has patches was made for it (8 x 2, not 4 x 4).

    Returns:
        The network in eval mode, float32, without classifier (``vit(images)`` gives the CLS feature
        ``(B, D)`` of images of its own size), and the report. Only what is beside the path to the
        features (classifiers, mask tokens, decoders) may be left over.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, corrupt, holds code, is no network that is known here, holds no
            such network, or a tensor on the path to the features is missing, left over or of another
            shape, which is named.

    Example:
        >>> import tempfile, torch
        >>> source = VisionTransformer(embed_dim=192, depth=1, num_heads=3, num_classes=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(source.state_dict(), f"{folder}/vit.pth")
        ...     vit, report = load_backbone(f"{folder}/vit.pth")
        >>> report.source, report.which, len(report.matched), report.missing
        ('timm', 'unnamed', 18, ())
    """
    stored = read_weights(path, which)
    model, report, _ = network_from(
        stored, model_name=model_name, num_heads=num_heads, img_size=img_size
    )
    return model, report


def initialize_from(
    backbone: nn.Module,
    head: nn.Module | None,
    path: str | Path,
    which: Which = "teacher",
    mask_token: nn.Parameter | None = None,
) -> LoadReport:
    """Start a training from stored weights (``method_kwargs.init_from``).

    The backbone must match, every tensor of it; its position embeddings are resampled to the network's
    grid. Of the head every tensor is taken that has the right shape, so that another number of
    prototypes keeps the MLP and starts new prototypes.

    Args:
        backbone: timm-style ViT to fill.
        head: projection head to fill, or None.
        path: see ``load_backbone``.
        which: ``teacher`` or ``student``.
        mask_token: ``(1, 1, D)``, to be filled with that of iBOT's student; None leaves it out.

    Returns:
        The report; ``head_skipped`` names the head tensors that keep their initial values, and
        ``mask_token`` says what became of the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``load_backbone``, or if the file's ViT has another size than ``backbone``.
    """
    if not backbones.is_vit(backbone):
        raise ValueError(
            f"init_from={path} cannot fill a {type(backbone).__name__}: only plain Vision Transformers"
        )
    stored = read_weights(path, which)
    heads = int(backbone.blocks[0].attn.num_heads)  # type: ignore[union-attr, index]
    known = known_heads(int(backbone.embed_dim), stored.config)  # type: ignore[arg-type]
    if known is not None and known[0] != heads:
        raise ValueError(
            f"init_from={path} has {known[0]} attention heads (from {known[1]}), but the backbone has "
            f"{heads}"
        )
    told = {**arguments_of(backbone), **told_arguments(stored.config)}
    stored = replace(stored, config={**stored.config, "model_args": told})
    source, source_report, _ = backbone_from(stored, num_heads=heads)
    state = source.state_dict()
    tensors = {name: state[name] for name in source_report.matched}
    old, new = backbones.position_grid(source), backbones.position_grid(backbone)
    if old != new:
        patch_h, patch_w = source.patch_embed.patch_size
        tensors["pos_embed"] = resize_position_embedding(
            source, (new[0] * patch_h, new[1] * patch_w)
        )
    report = load_into(stored, backbone, tensors, source_report.model_name)
    report = replace(
        report,
        unexpected=(*source_report.unexpected, *report.unexpected),
        resized=(old, new) if old != new else None,
    )
    if stored.mask_token is not None:
        if mask_token is not None:
            with torch.no_grad():
                mask_token.copy_(stored.mask_token)
        done = "left out: this network masks nothing" if mask_token is None else "taken"
        report = replace(report, mask_token=done)
    if head is None:
        return report
    fitting, missing, unexpected, mismatched = _fit(head, with_head(stored).head)
    _check_finite(stored.path, fitting)
    head.load_state_dict(fitting, strict=False)
    absent = [f"{name} (not in the file)" for name in missing]
    extra = [f"{name} (no place in the head)" for name in unexpected]
    return replace(report, head_matched=tuple(fitting), head_skipped=(*mismatched, *absent, *extra))
