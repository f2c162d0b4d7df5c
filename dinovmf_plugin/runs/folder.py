"""An output folder that a stopped run continues in, and that never mixes two settings."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from dinovmf_plugin._version import __version__

__all__ = [
    "file_digest",
    "open_run_folder",
    "pick_device",
    "versions",
    "write_atomic",
    "write_json",
]

_PACKAGES = ("torchvision", "timm", "numpy", "scipy", "pillow")


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out other readers of the results
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no nan
    return value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; numbers that are not finite become null.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_json(folder / "a.json", {"mAP": float("nan"), "scales": (1.0, 0.5)})
        >>> json.loads((folder / "a.json").read_text())
        {'mAP': None, 'scales': [1.0, 0.5]}
    """
    text = json.dumps(_json_ready(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_run_folder(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Make ``folder`` and bind it to ``settings``, or check that it is bound to the same.

    Args:
        folder: output folder; may be new, empty, or that of an earlier run.
        settings: whatever the results depend on; written to ``settings.json`` there.

    Returns:
        The folder's path.

    Raises:
        ValueError: if the folder belongs to other settings (the keys are named), or holds files
            that no run with a ``settings.json`` made.

    Example:
        >>> folder = open_run_folder(tempfile.mkdtemp(), {"imsize": 224})
        >>> open_run_folder(folder, {"imsize": 224}) == folder
        True
        >>> open_run_folder(folder, {"imsize": 512})
        Traceback (most recent call last):
        ValueError: output_dir ... holds results of other settings (imsize was 224, is now 512)...
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: name a folder")
    record = folder / "settings.json"
    now = json.loads(json.dumps(_json_ready({**settings, "plugin_version": __version__})))
    if record.is_file():
        before = json.loads(record.read_text())
        if before != now:
            changes = [
                f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key)
            ]
            raise ValueError(
                f"output_dir {folder} holds results of other settings ({'; '.join(changes)}): "
                "choose another folder, or the old settings to continue there"
            )
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {folder} is not empty and has no settings.json of an earlier run: choose a "
            "new or empty folder"
        )
    write_json(record, now)
    return folder


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU if there is one, else the CPU; other names are torch's.

    Raises:
        ValueError: if torch does not know the name or the machine lacks the device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here ({str(error).splitlines()[0]}): use auto, cpu or "
            "cuda:N"
        ) from error
    return chosen


def versions() -> dict[str, str]:
    """Versions of this plugin and of the libraries that can move a result."""
    # torch's own string keeps the build (+cu130), which the package's metadata drops
    found = {"dinovmf_plugin": __version__, "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
