"""Every key of a recipe is known to somebody, or it is named beside the key that was meant.

Known are the keys of this package and of solo-learn (``schema.KEYS``) and the arguments of Lightning's
Trainer. Below ``method_kwargs``, ``backbone.kwargs``, ``optimizer.kwargs`` and ``augmentations`` the method,
the network, the optimizer and the data recipe know their own.

Differs from upstream: solo-learn trains with the default in place of a misspelt key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.training.schema import KEYS, OPEN, trainer_arguments

__all__ = ["check_keys"]

# arguments of the Trainer that a run gives itself -> the value that says the same, and where to look
_OF_THE_RUN: dict[str, tuple[Any, str]] = {
    "callbacks": (None, "the method and checkpoint.* choose them"),
    "logger": (None, "csv.*, wandb.*, tensorboard.* and mlflow.* choose it"),
    "default_root_dir": (None, "checkpoint.dir is the place"),
    "enable_checkpointing": (False, "checkpoint.enabled is the switch"),
    "use_distributed_sampler": (False, "the loaders share the images out"),
    "num_sanity_val_steps": (0, "folders are checked before training"),
}
_REFERENCE = re.compile(r"\$\{\.*([\w.]+)")


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _texts(value)


def _unknown(node: dict[Any, Any], known: set[str], group: str = "") -> Iterator[str]:
    """Keys, dotted, that nobody knows; the groups that lead to a known key count as known."""
    for name, value in node.items():
        key = f"{group}{name}"
        if key in known:
            continue
        if not any(other.startswith(f"{key}.") for other in known):
            yield key
        elif isinstance(value, dict):
            yield from _unknown(value, known, f"{key}.")


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """The key that was meant: of the same group, or of the same name in another one.

    Example:
        >>> keys = ["data.val_path", "optimizer.lr", "optimizer.weight_decay", "optimizer.batch_size"]
        >>> [_nearest(key, keys) for key in ("optimizer.weight_decy", "batch_size", "optimiser.lr", "x")]
        ['optimizer.weight_decay', 'optimizer.batch_size', 'optimizer.lr', None]
    """
    group, _, name = key.rpartition(".")
    levels = {".".join(k.split(".")[: key.count(".") + 1]) for k in known}
    own = {k.rpartition(".")[2]: k for k in levels if k.rpartition(".")[0] == group}
    leaves = {k.rpartition(".")[2]: k for k in sorted(known, reverse=True)}
    for names, cutoff in ((leaves, 1.0), (own, 0.6), (leaves, 0.8)):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return names[close[0]]
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.8)
    return close[0] if close else None


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that nobody reads; those that others refer to (``${key}``) are read.

    Raises:
        ValueError: one sentence with every unknown key and the nearest right one.

    Example:
        >>> check_keys(OmegaConf.create({"data": {"no_label": True}, "max_epochs": 1}))
        Traceback (most recent call last):
        ...
        ValueError: data.no_label is no key of a recipe: did you mean data.no_labels?
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    referred = {found for text in _texts(plain) for found in _REFERENCE.findall(text)}
    known = {*KEYS, *OPEN, *trainer_arguments(), "hydra"}
    problems = []
    for key in _unknown(plain, known):
        if any(f"{other}.".startswith(f"{key}.") for other in referred):
            continue
        near = _nearest(key, known)
        group = key.rpartition(".")[0]
        siblings = sorted(k for k in known if k.rpartition(".")[0] == group)
        hint = f"did you mean {near}?" if near else f"known keys are {', '.join(siblings)}"
        problems.append(f"{key} is no key of a recipe: {hint}")
    for name, (value, place) in _OF_THE_RUN.items():
        if name in plain and plain[name] not in (None, value):
            problems.append(f"{name}={plain[name]!r} is not for a recipe: {place}")
    if problems:
        raise ValueError("; ".join(problems))
