"""Finished runs of a comparison, read back and grouped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinovmf_plugin.comparison.outcome import TRAINS
from dinovmf_plugin.comparison.run import RESULT

__all__ = ["Group", "group_runs", "read_results", "short_labels"]


def read_results(output_dir: str | Path) -> list[dict[str, Any]]:
    """Every ``result.json`` under ``output_dir/runs``, with its ``folder``, in the order of their starts.

    Raises:
        FileNotFoundError: if no run has finished.
        ValueError: if two results are of the same candidate, learning rate and seed.
    """
    root = Path(output_dir)
    seen: dict[tuple[Any, ...], str] = {}
    results = []
    for path in sorted((root / "runs").glob(f"*/*/{RESULT}")):
        result: dict[str, Any] = json.loads(path.read_text())
        result["folder"] = str(path.parent.relative_to(root))
        key = (result["label"], result["lr"], result["seed"])
        if key in seen:
            raise ValueError(
                f"{result['folder']} and {seen[key]} are both {key[0]} with seed {key[2]}: remove one of "
                f"the two from {root}"
            )
        seen[key] = result["folder"]
        results.append(result)
    if not results:
        raise FileNotFoundError(
            f"{root} holds no finished run (runs/*/*/{RESULT}): start the comparison first, or name its "
            "output_dir"
        )
    return sorted(results, key=lambda result: result["started"])


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: of the candidate.
        lr: that was set for it, or None.
        runs: in the order of seeds.
    """

    label: str
    lr: float | None
    runs: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        """Label and, where it was varied, learning rate."""
        return self.label if self.lr is None else f"{self.label}, lr {self.lr:g}"

    def values(self, metric: str) -> list[float]:
        """One accuracy per seed that trained; what collapsed is no value to compare."""
        return list(self.by_seed(metric).values())

    def by_seed(self, metric: str) -> dict[int, float]:
        """The same by seed."""
        return {
            run["seed"]: run["metrics"][metric] for run in self.whole if metric in run["metrics"]
        }

    @property
    def whole(self) -> list[dict[str, Any]]:
        """The runs that trained."""
        return [run for run in self.runs if run["outcome"] == TRAINS]

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured, in the order of the first run that has them."""
        return list(dict.fromkeys(metric for run in self.whole for metric in run["metrics"]))

    @property
    def broken(self) -> list[str]:
        """Outcomes of the runs that did not train."""
        return [run["outcome"] for run in self.runs if run["outcome"] != TRAINS]

    @property
    def switches(self) -> tuple[str, str]:
        """Normalization and centering of the first run."""
        return str(self.runs[0]["normalization"]), str(self.runs[0]["centering"])

    @property
    def spread(self) -> float:
        """Weight of KoLeo-proto (``prototype_spread``) of the first run."""
        kwargs = self.runs[0]["recipe"].get("method_kwargs") or {}
        return float(kwargs.get("prototype_spread") or 0.0)

    @property
    def unique_prototypes(self) -> list[int]:
        """Of every run that trained: prototypes without near-copies (see ``utilization_table``)."""
        found = [run["prototypes"] for run in self.whole if run["prototypes"]]
        at = [p["utilization"]["greedy"][str(p["void_set"]["threshold"])] for p in found]
        return [int(sweep["unique"]) for sweep in at]


def group_runs(results: Sequence[dict[str, Any]]) -> list[Group]:
    """Groups by candidate and learning rate, in the order of first appearance."""

    def groups() -> Iterator[Group]:
        keys = dict.fromkeys((result["label"], result["lr"]) for result in results)
        for label, lr in keys:
            runs = [r for r in results if (r["label"], r["lr"]) == (label, lr)]
            yield Group(label, lr, sorted(runs, key=lambda run: run["seed"]))

    return list(groups())


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Labels for tables: a method that comes once is its name; one method's cells are their two switches.

    Example:
        >>> short_labels(["dino_vmf", "ibot teacher_patch_temperature=0.04"])
        {'dino_vmf': 'dino_vmf', 'ibot teacher_patch_temperature=0.04': 'ibot'}
        >>> list(short_labels([f"ibot normalization={n}, centering=logit" for n in ("none", "vmf")]).values())
        ['none + logit', 'vmf + logit']
        >>> label = "ibot normalization=vmf, centering=logit, prototype_spread={}"
        >>> list(short_labels([label.format(weight) for weight in (0.0, 0.1)]).values())
        ['vmf + logit + spread 0.0', 'vmf + logit + spread 0.1']
    """
    methods = [label.partition(" ")[0] for label in labels]
    short = {}
    for label, method in zip(labels, methods, strict=True):
        rest = label.partition(" ")[2]
        switches = rest.removeprefix("normalization=").replace(", centering=", " + ")
        switches = switches.replace(", prototype_spread=", " + spread ")
        if methods.count(method) == 1:
            short[label] = method
        elif len(set(methods)) == 1 and "=" not in switches and " + " in switches:
            short[label] = switches
        else:
            short[label] = label
    return short
