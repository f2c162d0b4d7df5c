"""Published networks by timm's name, with weights from a local file: reference rows beside ours."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn

from dinovmf_plugin.checkpoints.layouts import StoredWeights
from dinovmf_plugin.checkpoints.loading import load_into
from dinovmf_plugin.checkpoints.named import NamedShape
from dinovmf_plugin.checkpoints.reading import read_file, resolve_file
from dinovmf_plugin.checkpoints.report import LoadReport
from dinovmf_plugin.core.vit import resample_positions_as

__all__ = ["PooledOutput", "RotaryTokens", "as_network", "published_network", "timm_name"]


class PooledOutput(nn.Module):
    """A network whose feature is its own pooled output, such as a ResNet or a ViT without CLS."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to ``(B, D)``.

        Raises:
            ValueError: if the network does not take images of this size.
        """
        try:
            return self.model(images)  # type: ignore[no-any-return]
        except AssertionError as error:
            height, width = images.shape[-2:]
            raise ValueError(
                f"{self.name} does not take images of {height} x {width} pixels: {error}"
            ) from error


class RotaryTokens(nn.Module):
    """timm's ``Eva`` (DINOv3, EVA-02): a ViT whose blocks are told positions, too.

    What ``core.vit`` asks of a network that it cannot drive block by block.
    """

    def __init__(self, model: Eva) -> None:
        super().__init__()
        self.model = model
        self.embed_dim, self.num_prefix_tokens = model.embed_dim, model.num_prefix_tokens

    @property
    def blocks(self) -> Any:
        """The network's blocks."""
        return self.model.blocks

    @property
    def norm(self) -> Any:
        """The final norm."""
        return self.model.norm

    @property
    def patch_embed(self) -> Any:
        """What cuts images into patches."""
        return self.model.patch_embed

    def forward(self, images: Tensor) -> Tensor:
        """CLS after the final norm, ``(B, D)``."""
        return self.model.forward_features(images)[:, 0]  # type: ignore[no-any-return]

    def block_tokens(self, images: Tensor, n: int) -> list[Tensor]:
        """Tokens ``(B, T, D)`` of the last ``n`` blocks before the final norm, oldest first."""
        found: Any = self.model.forward_intermediates(
            images, n, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in found]

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention probabilities ``(B, heads, T, T)`` of the last block, as the block computes them."""
        attention: Any = self.model.blocks[-1].attn
        seen: list[Tensor] = []
        hook = attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
        fused, attention.fused_attn = attention.fused_attn, False
        try:
            self.model.forward_features(images)
        finally:
            hook.remove()
            attention.fused_attn = fused
        return seen[0].float()


def timm_name(name: str) -> str:
    """The name, if timm has it (a pretrained tag may follow after a dot).

    Raises:
        ValueError: with the nearest name.

    Example:
        >>> timm_name("vit_small_patch14_reg4_dinov2.lvd142m")
        'vit_small_patch14_reg4_dinov2.lvd142m'
        >>> timm_name("vit_small_patch16_dinov4")
        Traceback (most recent call last):
        ValueError: checkpoint=timm:vit_small_patch16_dinov4 is no network of the installed timm: did you ...
    """
    known = timm.list_models()
    bare = name.partition(".")[0]
    if bare not in known:
        near = difflib.get_close_matches(bare, known, n=1, cutoff=0)[0]
        raise ValueError(
            f"checkpoint=timm:{name} is no network of the installed timm: did you mean timm:{near}?"
        )
    return name


def as_network(model: Any, name: str) -> nn.Module:
    """A timm network as the features here are taken from it.

    CLS and patches after a final norm where there is a CLS token and such a norm; the pooled output
    otherwise. Position embeddings are resampled as timm does, with antialiasing.
    """
    normed = not isinstance(getattr(model, "norm", None), nn.Identity | None)
    tokens = getattr(model, "cls_token", None) is not None and normed
    if tokens and type(model) is VisionTransformer and model.pos_embed is not None:
        resample_positions_as(model, "antialias")
        return model
    if tokens and isinstance(model, Eva):
        return RotaryTokens(model)
    return PooledOutput(model, name)


def _build(name: str) -> Any:
    create: Any = partial(timm.create_model, name, pretrained=False, num_classes=0)
    try:
        return create(dynamic_img_size=True)  # images of any size
    except TypeError:  # of networks that have no such switch
        return create()


def _state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


def published_network(
    name: str, weights: str | Path
) -> tuple[nn.Module, LoadReport, NamedShape, dict[str, Any]]:
    """timm's network of this name with the weights of a local file; nothing is downloaded.

    Args:
        name: see ``timm_name``.
        weights: ``.safetensors``, ``.pth`` or ``.bin``, with timm's names or those that timm converts
            (DINOv2's, CLIP's); see ``checkpoints.reading.read_file``.

    Returns:
        The network in eval mode, the load report, how it is built, and its configuration
        (``pretrained_cfg``: channel statistics).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if timm has no such network, or a tensor is missing, left over or of another shape.
    """
    model = _build(timm_name(name))
    path = resolve_file(weights)
    tensors = _state(read_file(path))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and tensors:
        try:
            tensors = dict(convert(tensors, model))
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"weight_file={path} holds no weights of timm:{name}: {error}"
            ) from error
    about = dict(model.pretrained_cfg)
    height, width = about["input_size"][1:]
    shape = NamedShape(name, int(model.num_features), (height, width))
    stored = StoredWeights(path, "timm", "unnamed", tensors)
    report = load_into(stored, model, tensors, f"timm:{name}")
    return as_network(model.eval(), name), report, shape, {"pretrained_cfg": about}
