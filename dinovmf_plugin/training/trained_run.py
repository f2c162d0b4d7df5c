"""A run that is over, as its folder tells it: checkpoint, recipe, curves, alarms."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dinovmf_plugin.training.curve import read_monitor

__all__ = ["Run"]

_NO_CURVES = ("epoch", "step")


def _start(path: Path) -> int:
    """Which start of the run wrote a ``metrics/version_N/metrics.csv``."""
    found = re.search(r"\d+$", path.parent.name)
    return int(found[0]) if found else 0


@dataclass(frozen=True)
class Run:
    """A training by its checkpoint; everything else is read back from the files beside it.

    It is a path, too: ``torch.load(run)`` and every function here that takes a checkpoint take it.

    Attributes:
        checkpoint: the file.

    Example:
        >>> run = Run(Path("trained_models/dino_vmf/photos-0123abcd/photos-ep9.ckpt"))
        >>> run.folder.name, Path(run) == run.checkpoint
        ('photos-0123abcd', True)
        >>> run.curves
        {}
    """

    checkpoint: Path

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    @property
    def folder(self) -> Path:
        """Where everything lies that the run wrote."""
        own = self.checkpoint.parent
        return own.parent if own.name == "previous" else own

    @property
    def paths(self) -> dict[str, Path]:
        """What the run wrote, by its name in the folder."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The complete recipe, defaults filled in.

        Raises:
            FileNotFoundError: if the folder has no ``args.json``.
        """
        text = (self.folder / "args.json").read_text(encoding="utf-8")
        recipe: dict[str, Any] = json.loads(text)
        return recipe

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values by metric, such as ``train_loss_epoch`` or ``monitor/target_information``.

        From the run's CSV log and the monitor's records; what is in both (the logger counts a step less) is
        taken of the records. Of a step that was made twice (a run that was stopped and went on), the later
        value counts.
        ``plt.plot(*run.curves["train_loss_step"])`` draws one.
        """
        found: dict[str, dict[int, float]] = {}
        for record in read_monitor(self.folder)["step"]:
            for name, value in record.items():
                if name not in _NO_CURVES and isinstance(value, int | float):
                    found.setdefault(f"monitor/{name}", {})[int(record["step"])] = float(value)
        recorded = set(found)
        for path in sorted(self.folder.rglob("metrics.csv"), key=_start):
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    for name, text in row.items():
                        if text and name not in _NO_CURVES and name not in recorded:
                            found.setdefault(name, {})[int(row["step"])] = float(text)
        return {name: (sorted(v), [v[step] for step in sorted(v)]) for name, v in found.items()}

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What the monitor warned of, with step and advice; see docs/training.md."""
        return read_monitor(self.folder)["alarm"]
