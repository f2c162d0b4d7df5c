"""What the keys of a recipe may hold: wrong types and impossible values are named before anything is built.

``method_kwargs`` has a schema of its own (``methods.settings``), ``augmentations`` too (``data.recipe``).
Which keys there are at all is ``keys.check_keys``'s question.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, get_args

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["KEYS", "LOGGERS", "OPEN", "check_values", "trainer_arguments"]

LOGGERS = ("csv", "wandb", "tensorboard", "mlflow")
_GROUPS = (
    "backbone",
    "backbone.kwargs",
    "data",
    "dali",
    "optimizer",
    "optimizer.kwargs",
    "scheduler",
    "momentum",
    "checkpoint",
    "auto_resume",
    *LOGGERS,
    "knn_eval",
    "performance",
    "auto_umap",
    "method_kwargs",
)
OPEN = ("method_kwargs", "backbone.kwargs", "optimizer.kwargs", "augmentations")
"""What lies below these is known to the method, the network, the optimiser and the data recipe."""
_TEXTS = (
    "name",
    "method",
    "backbone.name",
    "data.dataset",
    "data.format",
    "data.train_path",
    "data.val_path",
    "data.check_images",
    "dali.device",
    "optimizer.name",
    "scheduler.name",
    "scheduler.interval",
    "knn_eval.distance_func",
    "checkpoint.dir",
    "resume_from_checkpoint",
    "wandb.project",
    "wandb.entity",
    "auto_umap.dir",
)
_SWITCHES = (
    "data.no_labels",
    "data.skip_unreadable",
    "momentum.classifier",
    "checkpoint.enabled",
    "checkpoint.keep_prev",
    "debug_augmentations",
    "performance.compile",
    "performance.disable_channel_last",
    "performance.grad_checkpointing",
    "auto_resume.enabled",
    *(f"{name}.enabled" for name in LOGGERS),
    "wandb.offline",
    "knn_eval.enabled",
    "auto_umap.enabled",
    "dali.encode_indexes_into_labels",
    "optimizer.exclude_bias_n_norm_wd",
    "backbone.kwargs.dynamic_img_size",
)
# key -> smallest and largest whole number
_COUNTS = {
    "seed": (0, 2**32 - 1),
    "max_epochs": (1, math.inf),
    "num_nodes": (1, math.inf),
    "accumulate_grad_batches": (1, math.inf),
    "log_every_n_steps": (1, math.inf),
    "check_val_every_n_epoch": (1, math.inf),
    "data.num_workers": (0, math.inf),
    "optimizer.batch_size": (1, math.inf),
    "checkpoint.frequency": (0, math.inf),
    "knn_eval.k": (1, math.inf),
    "auto_umap.frequency": (1, math.inf),
    # counted from the data and the augmentations
    "data.num_classes": (1, math.inf),
    "data.num_large_crops": (1, math.inf),
    "data.num_small_crops": (0, math.inf),
    "backbone.kwargs.patch_size": (1, math.inf),
}
# key -> smallest and largest number
_NUMBERS = {
    "data.fraction": (-1, 1),
    "optimizer.lr": (0, 1e6),
    "optimizer.classifier_lr": (0, 1e6),
    "optimizer.base_lr": (0, 1e6),
    "optimizer.base_classifier_lr": (0, 1e6),
    "optimizer.weight_decay": (0, 1e6),
    "scheduler.min_lr": (0, 1e6),
    "scheduler.warmup_start_lr": (0, 1e6),
    "scheduler.warmup_epochs": (0, math.inf),
    "momentum.base_tau": (0, 1),
    "momentum.final_tau": (0, 1),
    "backbone.kwargs.drop_path_rate": (0, 1 - 1e-9),
    "gradient_clip_val": (0, math.inf),
    "auto_resume.max_hours": (0, math.inf),
}
# checked elsewhere; the last two are left over in recipes of solo-learn, which does not read them
_OTHERS = (
    "scheduler.lr_decay_steps",
    "checkpoint.folder",
    # arguments of Lightning's loggers and of wandb.init
    *(f"csv.{key}" for key in ("name", "prefix", "flush_logs_every_n_steps")),
    *(
        f"wandb.{key}"
        for key in ("name", "group", "job_type", "tags", "notes", "mode", "log_model")
    ),
    *(f"tensorboard.{key}" for key in ("name", "prefix", "log_graph")),
    *(f"mlflow.{key}" for key in ("experiment_name", "run_name", "tracking_uri", "tags")),
    "augmentations_cfg",
    "wandb_cfg",
)
KEYS = (*_TEXTS, *_SWITCHES, *_COUNTS, *_NUMBERS, *_OTHERS)
"""Every key outside ``OPEN`` that this package or solo-learn reads; the Trainer has further ones."""


def trainer_arguments() -> dict[str, Any]:
    """Lightning's own keys of a recipe: name -> annotated type."""
    parameters = dict(inspect.signature(Trainer.__init__).parameters)
    parameters.pop("self")
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _check_number(key: str, value: Any, low: float, high: float, whole: bool) -> None:
    if _is_number(value, whole) and low <= value <= high and math.isfinite(value):
        return
    kind = "a whole number" if whole else "a number"
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    raise ValueError(f"{key}={value!r} must be {kind} {limits}")


def _check_size(value: Any) -> None:
    sides = value if isinstance(value, list) else [value]
    if len(sides) not in (1, 2) or not all(_is_number(x, True) and x > 0 for x in sides):
        raise ValueError(
            f"backbone.kwargs.img_size={value!r} must be a number of pixels or [height, width]"
        )


def _infinite(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, (dict, list)):
            yield from _infinite(value, key)
        elif isinstance(value, float) and not math.isfinite(value):
            yield key, value


def _check_trainer_argument(name: str, value: Any, kind: Any) -> None:
    """By Lightning's annotation, where it says a switch or a number; it takes others without a word."""
    kinds = {k for k in (get_args(kind) or (kind,)) if k is not type(None)}
    if kinds == {bool} and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    if kinds == {int} and not _is_number(value, True):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if kinds == {int, float} and not _is_number(value, False):
        raise ValueError(f"{name}={value!r} must be a number")


def check_values(cfg: DictConfig) -> None:
    """Check types and ranges of the keys above; absent keys and None are left to others.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right.

    Example:
        >>> check_values(OmegaConf.create({"optimizer": {"batch_size": "64 images"}}))
        Traceback (most recent call last):
        ...
        ValueError: optimizer.batch_size='64 images' must be a whole number of at least 1
    """
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{error.full_key} cannot be resolved: {reason}") from error

    def value_of(key: str) -> Any:
        node = plain
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return None if node == "???" else node

    for key in _GROUPS:
        value = value_of(key)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{key}={value!r} must be a group of keys, not a value")
    for key in _TEXTS:
        value = value_of(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{key}={value!r} must be a text that is not empty")
    for key in _SWITCHES:
        value = value_of(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{key}={value!r} must be True or False")
    for table, whole in ((_COUNTS, True), (_NUMBERS, False)):
        for key, (low, high) in table.items():
            if (value := value_of(key)) is not None:
                _check_number(key, value, low, high, whole)
    if (value := value_of("backbone.kwargs.img_size")) is not None:
        _check_size(value)
    for name, kind in trainer_arguments().items():
        if (value := value_of(name)) is not None:
            _check_trainer_argument(name, value, kind)
    for key, value in _infinite(plain):
        raise ValueError(f"{key}={value} must be a finite number")
