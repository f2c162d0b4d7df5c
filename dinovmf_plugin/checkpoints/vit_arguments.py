"""Arguments of timm's ViT that no tensor tells: those of a file's config, and which of them can be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["arguments_of", "check_vit_kwargs", "select", "told_arguments"]

# arguments of timm's ViT: read off the tensors or off the config, or without effect on a trained network
_READ = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio"}
_READ |= {"qkv_bias", "init_values", "pre_norm", "qk_norm", "no_embed_class", "reg_tokens"}
_WITHOUT_EFFECT = {"drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"}
_WITHOUT_EFFECT |= {"drop_path_rate", "dynamic_img_size", "num_classes", "weight_init", "fix_init"}
# those with one value that the CLS token after the final norm, the feature of every method here, allows
_FIXED: dict[str, tuple[Any, ...]] = {
    "class_token": (True,),
    "global_pool": ("token",),
    "final_norm": (True,),
    "fc_norm": (None, False),
    "patch_drop_rate": (0,),
    "dynamic_img_pad": (False,),
    "pos_embed": ("learn",),
    "proj_bias": (True,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "embed_norm_layer": (None,),
    "pool_include_prefix": (False,),
}


def select(config: Mapping[str, Any], *path: str) -> Any:
    """What nested groups hold under the keys of a path; None where one is missing.

    Example:
        >>> select({"backbone": {"name": "vit_small"}}, "backbone", "name")
        'vit_small'
    """
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def told_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the ViT that a file's config tells: a run's ``backbone.kwargs``, timm's ``model_args``."""
    found: dict[str, Any] = {}
    for path in (("backbone", "kwargs"), ("model_args",)):
        part = select(config, *path)
        found |= dict(part) if isinstance(part, Mapping) else {}
    return found


def arguments_of(vit: Any) -> dict[str, Any]:
    """Arguments of a ViT that its tensors' shapes do not tell, read off the network itself."""
    size = vit.patch_embed.img_size
    return {
        "img_size": None if size is None else list(size),
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "qk_norm": not isinstance(vit.blocks[0].attn.q_norm, nn.Identity),
        "no_embed_class": bool(vit.no_embed_class),
    }


def check_vit_kwargs(kwargs: Mapping[str, Any], key: str = "backbone.kwargs") -> None:
    """Refuse arguments of timm's ViT with which the CLS feature would be another than is computed here.

    Args:
        kwargs: arguments of ``timm.models.VisionTransformer``.
        key: where they stand, for the message.

    Raises:
        ValueError: naming the first such argument and what would be right.

    Example:
        >>> check_vit_kwargs({"patch_size": 8, "global_pool": "avg"})
        Traceback (most recent call last):
        ValueError: backbone.kwargs.global_pool='avg' is not supported: ... which needs 'token'
    """
    for name, value in kwargs.items():
        if name in _READ | _WITHOUT_EFFECT:
            continue
        if name not in _FIXED:
            raise ValueError(
                f"{key}.{name}={value!r} is not supported: no stored weight tells of it, so that a "
                "loaded network could have other features than the trained one; leave it out"
            )
        if value not in _FIXED[name]:
            raise ValueError(
                f"{key}.{name}={value!r} is not supported: the feature here is the CLS token after the "
                f"final norm, which needs {_FIXED[name][0]!r}"
            )
