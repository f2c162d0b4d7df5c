"""Weights out: safetensors that explain themselves, ``config.json`` for timm and the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dinovmf_plugin._version import __version__
from dinovmf_plugin.checkpoints.architecture import ViTShape
from dinovmf_plugin.checkpoints.heads import HeadSettings
from dinovmf_plugin.checkpoints.layouts import StoredWeights
from dinovmf_plugin.checkpoints.named import NamedShape
from dinovmf_plugin.checkpoints.provenance import training_told
from dinovmf_plugin.checkpoints.reading import CONFIG_KEY
from dinovmf_plugin.data.channels import channel_statistics
from dinovmf_plugin.runs.files import write_file

__all__ = ["check_free", "inside", "timm_config", "write_safetensors"]

# arguments of timm's networks that count while training alone
_TRAINING_ONLY = {
    "drop_rate",
    "drop_path_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "pos_drop_rate",
}


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refusing names that leave the folder.

    Raises:
        ValueError: if ``name`` points outside ``folder``, also through a symbolic link.

    Example:
        >>> inside(Path("weights"), "../elsewhere.safetensors")
        Traceback (most recent call last):
        ...
        ValueError: ../elsewhere.safetensors would be written outside the output folder weights
    """
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} would be written outside the output folder {folder}")
    return target


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse to replace files, before any work is done.

    Raises:
        FileExistsError: if a path exists and ``overwrite`` is false.
        IsADirectoryError: if a path is a folder.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, but a file is to be written there")
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists already: choose another output or add --overwrite"
            )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors with their config in the metadata, atomically."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    write_file(path, save(plain, metadata))


def timm_config(
    shape: ViTShape | NamedShape, stored: StoredWeights, head: HeadSettings | None = None
) -> dict[str, Any]:
    """``config.json`` as timm and the Hub read it, with this project's own part for its provenance.

    Args:
        shape: architecture; ``model_args`` holds every size, so that unusual ones load as well.
        stored: where the weights come from.
        head: settings of the head, if one is stored beside the backbone.
    """
    mean, std = channel_statistics(stored.config)
    own: dict[str, Any] = {
        "version": __version__,
        "source": stored.source,
        "which": stored.which,
        "file": stored.path.name,
        "position_resampling": stored.position_resampling,
    }
    training = training_told(stored)
    if training:
        own["training"] = training
    previous = stored.config.get("dinovmf_plugin")
    if stored.source == "timm" and isinstance(previous, Mapping):
        own |= {**previous, "version": __version__}
    if head is not None:
        own["head"] = asdict(head)
    if isinstance(shape, NamedShape):
        pooling, first, classifier, fixed = shape.hub
    else:
        pooling, first, classifier, fixed = "token", "patch_embed.proj", "head", True
    return {
        "architecture": shape.architecture,
        "num_classes": 0,
        "num_features": shape.embed_dim,
        "global_pool": pooling,
        "model_args": {
            key: value
            for key, value in shape.model_args.items()
            if value is not None and key not in _TRAINING_ONLY
        },
        "pretrained_cfg": {
            "tag": "dinovmf",
            "custom_load": False,
            "input_size": [shape.in_chans, *shape.img_size],
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": first,
            "classifier": classifier,
        },
        "dinovmf_plugin": own,
    }
