"""The one rule of every ``output_dir``.

Finished results are never overwritten: those of an earlier run are moved aside. What a stopped run left
half-done is continued by the same command; other settings are refused by name, never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin._version import __version__
from dinovmf_plugin.runs.files import as_json, keep_previous, write_json

__all__ = ["open_run_folder"]


def open_run_folder(
    folder: str | Path, settings: Mapping[str, Any] | None = None, results: Sequence[str] = ()
) -> Path:
    """Make ``folder``, bind it to ``settings``, and move finished ``results`` aside.

    Args:
        folder: output folder; may be new, empty, or that of an earlier run.
        settings: whatever the half-done work of a stopped run depends on; written to
            ``settings.json`` there. None: the command leaves nothing half-done, and its results may lie
            beside others.
        results: names of the files that the run will write when it has found something; earlier ones
            become ``NAME.1.json`` and so on, and a line on the screen says so.

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
    if settings is not None:
        _bind(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    for name in results:
        aside = keep_previous(folder / name)
        if aside is not None:
            print(f"kept the previous {name} as {aside.name}")
    return folder


def _bind(folder: Path, settings: Mapping[str, Any]) -> None:
    record = folder / "settings.json"
    now = json.loads(json.dumps(as_json({**settings, "plugin_version": __version__})))
    if record.is_file():
        before = json.loads(record.read_text())
        changes = [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise ValueError(
                f"output_dir {folder} holds results of other settings ({'; '.join(changes)}): "
                "choose another folder, or the old settings to continue there"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {folder} is not empty and has no settings.json of an earlier run: choose a "
            "new or empty folder"
        )
    else:
        write_json(record, now)
