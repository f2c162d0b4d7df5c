"""Whether training can go on from a file, told before anything is built on it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dinovmf_plugin.checkpoints.reading import read_file

__all__ = ["check_resumable"]

_NEEDED = ("state_dict", "optimizer_states", "loops", "epoch", "pytorch-lightning_version")


def check_resumable(
    path: str | Path, model: nn.Module, key: str = "resume_from_checkpoint"
) -> None:
    """Refuse a file that is no training checkpoint of this model.

    Args:
        path: the file.
        model: what is going to be trained.
        key: config key of the file, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds weights alone, or weights of another model; one sentence.
    """
    try:
        content = read_file(path)
    except ValueError as error:
        raise ValueError(f"{key}={path} cannot be resumed: {error}") from error
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise ValueError(
            f"{key}={path} is no training checkpoint: it has no {', no '.join(missing)}; to start from "
            f"weights alone, set method_kwargs.init_from={path}"
        )
    stored, own = content["state_dict"], model.state_dict()
    for name in sorted(stored.keys() | own.keys()):
        ours, theirs = (tuple(t[name].shape) if name in t else None for t in (own, stored))
        if ours != theirs:
            raise ValueError(
                f"{key}={path} is of another model: {name} has the shape {theirs} in it and {ours} in this "
                "run (None: it is not there); resume with what it was trained with"
            )
