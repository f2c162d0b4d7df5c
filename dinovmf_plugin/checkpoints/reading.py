"""Opening foreign weight files without running anything that they contain."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

__all__ = ["CONFIG_KEY", "read_file", "resolve_file"]

CONFIG_KEY = "config"
"""Metadata entry of our own ``.safetensors`` that repeats ``config.json``: the file explains itself."""


def _safe_globals() -> list[Any]:
    """What official training checkpoints hold beside tensors and plain containers.

    ``args`` is an ``argparse.Namespace`` and the learning rates inside ``optimizer`` are numpy
    scalars. Both are safe to allow: a Namespace has no ``__setstate__`` or ``__reduce__``, so that
    unpickling only sets attributes; numpy's ``scalar`` copies bytes into a fixed-size number (object
    dtypes are not in this list). Neither can import, call or open anything.
    """
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
        # numpy 2 renamed the module; files written by either must open under both
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def resolve_file(path: str | Path) -> Path:
    """``path`` itself, or ``model.safetensors`` in it when it is an exported folder.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder without model.safetensors: give the checkpoint file itself"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    return path


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file: {_first_line(error)}"
        ) from error
    config: Any = metadata.get(CONFIG_KEY)
    beside = path.parent / "config.json"
    try:
        if config is not None:
            config = json.loads(config)
        elif beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        where = f"the metadata of {path}" if config is not None else str(beside)
        raise ValueError(f"{where} is not valid JSON: {_first_line(error)}") from error
    return {"state_dict": tensors, "config": config if isinstance(config, dict) else {}}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _why_unreadable(path: Path, error: BaseException) -> str:
    """One sentence for the user about a file that ``torch.load(weights_only=True)`` refused."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return f"{path} is empty"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"{path} is truncated: the end of the archive is missing; copy or download it again"
    if "GLOBAL" in str(error):  # the unpickler's word for a class or function
        try:
            with torch.serialization.safe_globals(_safe_globals()):
                names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # only zip archives can be listed; the refusal itself stands
            names = []
        what = f" ({', '.join(names)})" if names else ""
        return (
            f"{path} was refused: it holds pickled objects other than weights{what}, which could run "
            "code when loaded; save its state dict alone and import that"
        )
    # torch's own text advises weights_only=False, which nobody should follow
    reason = "" if "weights_only" in str(error) else f": {_first_line(error)}"
    return f"{path} is not a readable PyTorch checkpoint (truncated, corrupt or of another kind){reason}"


def read_file(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Content of a ``.safetensors``, ``.pth``, ``.pth.tar`` or ``.ckpt`` file, on the CPU.

    PyTorch files are read with ``weights_only=True``: tensors and plain containers, nothing else.

    Args:
        path: a file, or a folder with ``model.safetensors``.
        mapped: leave tensors on the disk until they are used, where the format can.

    Returns:
        The stored dictionary; a safetensors file becomes ``{"state_dict": .., "config": ..}``, the
        config being its own metadata or, failing that, ``config.json`` beside it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, corrupt, no dictionary, or holds pickled objects.
    """
    path = resolve_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            mapped = mapped and zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen types for broken files
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, but a dictionary of weights is needed"
        )
    return content
