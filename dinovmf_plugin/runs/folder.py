"""An output folder that a stopped run continues in, and that never mixes two settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinovmf_plugin._version import __version__
from dinovmf_plugin.runs.files import plain, write_json

__all__ = ["open_run_folder"]


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
        >>> import tempfile
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
    now = json.loads(json.dumps(plain({**settings, "plugin_version": __version__})))
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
