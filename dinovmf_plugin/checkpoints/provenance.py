"""How stored weights were trained, as far as it may be told to everybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dinovmf_plugin.checkpoints.layouts import StoredWeights

__all__ = ["public_recipe", "training_told"]

# groups and keys about one machine and its user, which change no weight
_PRIVATE = {"csv", "wandb", "tensorboard", "mlflow", "neptune", "checkpoint", "auto_resume"}
_PRIVATE |= {"auto_umap", "hydra", "resume_from_checkpoint", "gpu", "rank", "local_rank"}
_RUN_NAME = "name"  # at the top of a recipe; backbone.name and optimizer.name are others
_PLACE = re.compile(r"(^|_)(paths?|dirs?|root|folder|file|from|url|entity|project|user|hosts?)$")
_A_PLACE = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\])|://")


def _public(key: str, value: Any) -> bool:
    if key in _PRIVATE or _PLACE.search(key):
        return False
    return not (isinstance(value, str) and _A_PLACE.search(value))


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_recipe(value)
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value if _public("", item)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def public_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that say how weights came about, without paths, loggers and names of people.

    Args:
        config: a run's resolved config, or the arguments of an official script.

    Example:
        >>> public_recipe({"max_epochs": 3, "data": {"dataset": "custom", "train_path": "/home/a"}})
        {'max_epochs': 3, 'data': {'dataset': 'custom'}}
    """
    kept = {str(k): _cleaned(v) for k, v in config.items() if _public(str(k), v)}
    return {key: value for key, value in kept.items() if value != {}}


def training_told(stored: StoredWeights) -> dict[str, Any]:
    """What the file tells about the training of its weights.

    Returns:
        ``steps`` of the optimizer and the ``recipe``, each where the file has it; nothing for a bare
        state dict.
    """
    if stored.source == "timm":  # its config is that of a network, or of an export: see timm_config
        return {}
    told: dict[str, Any] = {} if stored.steps is None else {"steps": stored.steps}
    recipe = public_recipe({k: v for k, v in stored.config.items() if k != _RUN_NAME})
    return {**told, "recipe": recipe} if recipe else told
