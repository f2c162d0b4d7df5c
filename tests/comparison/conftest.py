"""Tiny images, settings that train in a second, and results as runs would have left them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

OVERRIDES = [
    "max_epochs=2",
    "data.format=image_folder",
    "data.num_workers=0",
    "backbone.kwargs.patch_size=16",
    "method_kwargs.num_prototypes=64",
    "method_kwargs.proj_hidden_dim=32",
    "method_kwargs.proj_output_dim=16",
    "method_kwargs.monitor_every=1",
    "optimizer.batch_size=4",
    "scheduler.warmup_epochs=1",
    "+enable_progress_bar=False",
]
EVALUATION = {
    "progress": False,
    "device": "cpu",
    "data": {"num_workers": 0, "batch_size": 16},
    "knn": {"ks": [1, 3]},
    "linear": {"augment": False, "epochs": 2, "batch_size": 4, "features": ["cls", "dino"]},
    "few_shot": {"counts": [1, 2], "num_splits": 2, "fraction": None},
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise around two colors, ``train`` (6 each) and ``val`` (3 each)."""
    root = tmp_path_factory.mktemp("pictures")
    generator = random.Random(0)
    for part, count in (("train", 6), ("val", 3)):
        for name, base in (("blue", 40), ("red", 160)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = bytes(base + generator.randrange(80) for _ in range(32 * 32 * 3))
                Image.frombytes("RGB", (32, 32), noise).save(folder / f"{name}{i}.png")
    return root


@pytest.fixture(scope="session")
def make_comparison(pictures: Path) -> Any:
    """Factory of ``ComparisonSettings`` for a folder."""
    from dinovmf_plugin.comparison.settings import comparison_from
    from dinovmf_plugin.comparison.shared import ComparisonSettings

    def make(output_dir: Path, kind: str = "compare", **changes: Any) -> ComparisonSettings:
        values: dict[str, Any] = {
            "overrides": OVERRIDES,
            "output_dir": str(output_dir),
            "data": {
                "train_path": str(pictures / "train"),
                "val_path": str(pictures / "val"),
            },
            "k": 1,
            "curve_every": 1,
            "evaluations": ["knn", "linear", "few_shot"],
            "evaluation": EVALUATION,
            **changes,
        }
        return comparison_from(values, kind)

    return make


def _result(
    label: str,
    seed: int,
    knn: float | None,
    *,
    kind: str = "compare",
    lr: float | None = None,
    outcome: str = "trains",
    switches: tuple[str, str] = ("none", "logit"),
    spread: float = 0.0,
) -> dict[str, Any]:
    method, _, _ = label.partition(" ")
    metrics = {} if knn is None else {"knn_k10": knn, "knn_k20": knn - 1, "linear_cls": knn + 2}
    prototypes = {
        "utilization": {"greedy": {"0.9": {"unique": 50 + seed, "largest": 9}}},
        "void_set": {"threshold": 0.9, "is_void": seed == 0},
        "drift": {"data_cosine_median": -0.5 - seed / 10},
        "usage": {"usage_perplexity": 30.0},
        "concentration": {"kappa_p05": 8.0, "kappa_median": 10.0 + seed, "kappa_p95": 12.0},
        "held_out_log_likelihood": 20.0 + seed,
    }
    return {
        "identity": f"{label}{seed}{lr}",
        "label": label,
        "method": method,
        "normalization": switches[0],
        "centering": switches[1],
        "seed": seed,
        "lr": lr,
        "outcome": outcome,
        "diverged": "the loss became nan at step 3" if outcome == "diverged" else None,
        "metrics": metrics,
        "baselines": {"untrained": {"knn_k10": 60.0}} if metrics else {},
        "prototypes": prototypes if metrics else None,
        "curve": [{"epoch": 1, "loss": 4.0, "top1": 50.0}, {"epoch": 2, "loss": 3.0, "top1": knn}],
        "monitor": {"step": [], "epoch": [{"epoch": 0, "kappa_median": 10.0}], "alarm": []},
        "seconds": {"training": 30.0, "evaluation": 6.0},
        "started": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "a processor", "cores": 2, "threads": 1, "gpu": None},
        "versions": {"torch": "2"},
        "settings": {"kind": kind, "k": 10},
        "recipe": {
            "backbone": {"name": "vit_nano"},
            "max_epochs": 2,
            "method_kwargs": {"num_prototypes": 64, "prototype_spread": spread},
            "data": {"train_path": "photos/train"},
        },
    }


@pytest.fixture
def write_results(tmp_path: Path) -> Any:
    """Factory: writes results into ``tmp_path/runs`` from ``(label, seed, knn, options)`` and returns it."""

    def write(*runs: tuple[Any, ...], kind: str = "compare") -> Path:
        for number, (label, seed, knn, *rest) in enumerate(runs):
            result = _result(label, seed, knn, kind=kind, **(rest[0] if rest else {}))
            folder = tmp_path / "runs" / result["method"] / f"{number:02d}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result))
        return tmp_path

    return write
