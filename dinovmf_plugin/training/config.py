"""The host's config processing (``solo.args.pretrain.parse_cfg`` of main), for both generations.

Differs from upstream: ``devices`` may be what Lightning accepts (``1``, ``"2"``, ``[0, 1]``, ``"auto"``)
where the host takes ``len(devices)``; a missing key is named before anything is built.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.data.folders import class_names
from dinovmf_plugin.data.module import image_location
from dinovmf_plugin.data.recipe import parse_recipe
from dinovmf_plugin.training.keys import check_keys
from dinovmf_plugin.training.recipe import default_of
from dinovmf_plugin.training.schema import LOGGERS, check_values
from dinovmf_plugin.training.umap import check_umap

__all__ = ["NUM_CLASSES", "count_devices", "parse_cfg"]

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet": 1000, "imagenet100": 100}
DATASETS = (*NUM_CLASSES, "custom")

# what the host and Lightning look up without asking whether it is there; Lightning's own keys first
_DEFAULTS: dict[str, Any] = {
    "strategy": "auto",
    "accelerator": "auto",
    "devices": 1,
    "precision": "32-true",
    **{
        key: default_of(key)
        for key in (
            "seed",
            "num_nodes",
            "resume_from_checkpoint",
            "debug_augmentations",
            "data.val_path",
            "data.source",
            "data.format",
            "data.no_labels",
            "data.fraction",
            "data.num_workers",
            "dali.device",
            "dali.encode_indexes_into_labels",
            "optimizer.classifier_lr",
            "checkpoint.enabled",
            "checkpoint.dir",
            "checkpoint.frequency",
            "checkpoint.keep_prev",
            "auto_resume.enabled",
            *(f"{name}.enabled" for name in LOGGERS),
            "performance.compile",
            "performance.disable_channel_last",
            "performance.grad_checkpointing",
        )
    },
}


def count_devices(devices: Any, accelerator: str = "auto") -> int:
    """How many processes a node runs, for Lightning's spellings of ``devices``.

    Raises:
        ValueError: if ``devices`` is none of Lightning's spellings.

    Example:
        >>> count_devices(2), count_devices("4"), count_devices([0, 1, 3]), count_devices("0,1")
        (2, 4, 3, 2)
    """
    import torch

    if OmegaConf.is_list(devices) or isinstance(devices, (list, tuple)):
        return len(devices)
    if devices in ("auto", -1, "-1", None):
        return max(torch.cuda.device_count(), 1) if accelerator != "cpu" else 1
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(
        f"devices={devices!r} is not understood: give a number, a list such as [0, 1], or auto"
    )


def _require(cfg: DictConfig, *keys: str) -> None:
    for key in keys:
        if OmegaConf.select(cfg, key, throw_on_missing=False) is None:
            raise ValueError(
                f"{key} is missing from the config: set it in the recipe or as {key}=..."
            )


def _count_classes(cfg: DictConfig) -> int:
    if cfg.data.dataset in NUM_CLASSES:
        return NUM_CLASSES[cfg.data.dataset]
    if cfg.data.no_labels:
        return 1
    location = image_location(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    if location.source != "folder":
        return max(1, len(location.classes()))
    root = Path(cfg.data.train_path)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.train_path={root} is not a folder: give the folder of images"
        )
    return max(1, len(class_names(root)))


def _refuse_unserved(cfg: DictConfig) -> None:
    """Keys of the host that are not served, here or on this machine."""
    check_umap(cfg)
    if OmegaConf.select(cfg, "auto_resume.max_hours") is not None:
        warnings.warn(
            "auto_resume.max_hours has no effect here: a run finds its own checkpoint, however old",
            stacklevel=3,
        )


def _set_counted(cfg: DictConfig, key: str, count: int) -> None:
    """A number that is counted, not chosen: another one in the recipe is refused."""
    given = OmegaConf.select(cfg, key)
    if given not in (None, count):
        raise ValueError(
            f"{key}={given!r} is counted, not chosen, and there are {count}: leave it out"
        )
    OmegaConf.update(cfg, key, count)


def _scale(cfg: DictConfig, name: str, factor: float) -> None:
    """Set ``optimizer.<name>`` for the batch and keep the rate per 256 images as ``base_<name>``."""
    given = cfg.optimizer[name]
    base = cfg.optimizer.get(f"base_{name}")
    if base is None:
        base = given
    elif given != base * factor:
        raise ValueError(
            f"optimizer.{name}={given} is not optimizer.base_{name}={base} x {factor:g}, the batch of all "
            f"processes / 256: to choose optimizer.{name} per 256 images, leave optimizer.base_{name} out"
        )
    cfg.optimizer[f"base_{name}"] = base
    cfg.optimizer[name] = base * factor


def parse_cfg(cfg: DictConfig) -> DictConfig:
    """Fill in defaults, count classes and crops, scale learning rates by the batch.

    ``optimizer.lr`` and, with ``data.val_path``, ``optimizer.classifier_lr`` are multiplied by
    ``batch_size * devices * num_nodes / 256``, as the host and DINO do. The rates as given stay beside them
    (``optimizer.base_lr``, ``optimizer.base_classifier_lr``): parsing a parsed config changes nothing.

    Args:
        cfg: the recipe; it is left as it is.

    Returns:
        A new config.

    Raises:
        ValueError: if a key is unknown or missing or has an impossible value; the message names it.
        FileNotFoundError: if ``data.train_path`` is not a folder.
        ImportError: if ``auto_umap.enabled`` asks for a package that is not installed.

    Differs from upstream: the host changes the config it is given, and scales once more when called again.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    check_keys(cfg)
    check_values(cfg)
    _refuse_unserved(cfg)
    for key, value in _DEFAULTS.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value)
    _require(
        cfg,
        "name",
        "method",
        "backbone.name",
        "data.dataset",
        "data.train_path",
        "max_epochs",
        "optimizer.name",
        "optimizer.batch_size",
        "optimizer.lr",
        "optimizer.weight_decay",
        "scheduler.name",
        "augmentations",
    )
    if cfg.data.dataset not in DATASETS:
        raise ValueError(f"data.dataset={cfg.data.dataset!r} is unknown: choose one of {DATASETS}")
    _set_counted(cfg, "data.num_classes", _count_classes(cfg))

    recipe = parse_recipe(cfg.augmentations, dataset=cfg.data.dataset)
    large = sum(crop.size == recipe[0].size for crop in recipe)
    _set_counted(cfg, "data.num_large_crops", large)
    _set_counted(cfg, "data.num_small_crops", len(recipe) - large)

    processes = count_devices(cfg.devices, cfg.accelerator) * cfg.num_nodes
    factor = cfg.optimizer.batch_size * processes / 256
    _scale(cfg, "lr", factor)
    if cfg.data.val_path is not None:
        _scale(cfg, "classifier_lr", factor)
    if cfg.optimizer.name == "adamw" and OmegaConf.select(cfg, "optimizer.kwargs.betas") is None:
        OmegaConf.update(cfg, "optimizer.kwargs", {"betas": [0.9, 0.999]}, merge=True)
    if cfg.optimizer.name == "sgd" and OmegaConf.select(cfg, "optimizer.kwargs.momentum") is None:
        OmegaConf.update(cfg, "optimizer.kwargs", {"momentum": 0.9}, merge=True)
    return cfg
