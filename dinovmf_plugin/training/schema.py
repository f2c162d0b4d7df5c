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
from omegaconf import DictConfig

from dinovmf_plugin.runs.settings import plain, settings_of
from dinovmf_plugin.training.recipe import RECIPE

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
"""What lies below these is known to the method, the network, the optimizer and the data recipe."""
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
KEYS = (*(f"{group}{key}" for group, kind in RECIPE.items() for key in settings_of(kind)), *_OTHERS)
"""Every key outside ``OPEN`` that this package or solo-learn reads; the Trainer has further ones."""


def trainer_arguments() -> dict[str, Any]:
    """Lightning's own keys of a recipe: name -> annotated type."""
    parameters = dict(inspect.signature(Trainer.__init__).parameters)
    parameters.pop("self")
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


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
        >>> from omegaconf import OmegaConf
        >>> check_values(OmegaConf.create({"optimizer": {"batch_size": "64 images"}}))
        Traceback (most recent call last):
        ...
        ValueError: optimizer.batch_size='64 images' must be a whole number of at least 1
    """
    config = plain(cfg)

    def value_of(key: str) -> Any:
        node = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return None if node == "???" else node

    for key in _GROUPS:
        value = value_of(key)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{key}={value!r} must be a group of keys, not a value")
    for group, settings in RECIPE.items():
        for name, setting in settings_of(settings).items():
            if (value := value_of(f"{group}{name}")) is not None:
                try:
                    setting.check(value)
                except ValueError as error:
                    raise ValueError(f"{group}{error}") from None
    for name, kind in trainer_arguments().items():
        if (value := value_of(name)) is not None:
            _check_trainer_argument(name, value, kind)
    for key, value in _infinite(config):
        raise ValueError(f"{key}={value} must be a finite number")
