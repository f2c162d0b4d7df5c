"""Whole sweeps through hydra's launchers: ``pytest -m slow tests/comparison``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "max_epochs=1",
    "scheduler.warmup_epochs=0",
    "data.format=image_folder",
    "data.num_workers=0",
    "backbone.kwargs.patch_size=16",
    "method_kwargs.num_prototypes=64",
    "method_kwargs.proj_hidden_dim=32",
    "optimizer.batch_size=4",
    "+enable_progress_bar=False",
]


def sweep(
    output: Path, pictures: Path, script: str, *arguments: str, overrides: list[str] = OVERRIDES
) -> str:
    listed = ",".join(f"'{override}'" for override in overrides)
    command = [
        sys.executable,
        str(ROOT / "scripts" / f"{script}.py"),
        f"output_dir={output}",
        f"data.train_path={pictures / 'train'}",
        f"data.val_path={pictures / 'val'}",
        f"overrides=[{listed}]",
        "evaluations=[knn]",
        "evaluation.knn.ks=[1]",
        "k=1",
        "evaluation.data.num_workers=0",
        "evaluation.progress=false",
        *arguments,
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=output.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_sweep_through_a_launcher(launcher: str, pictures: Path, tmp_path: Path) -> None:
    if launcher != "basic":
        plugin = f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher"
        if importlib.util.find_spec(plugin) is None:
            pytest.skip(f"{plugin} is not installed: pip install dinovmf-plugin[cluster]")
    extra = {
        "basic": [],
        "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    }[launcher]
    output = tmp_path / "out"
    arguments = ["methods=[dino_vmf,'dino_multicrop:normalization=l2']", "seeds=[0]", *extra]
    sweep(output, pictures, "compare", *arguments)
    first = json.loads((output / "compare.json").read_text())
    labels = {g["label"] for g in first["groups"]}
    assert labels == {"dino_multicrop normalization=l2", "dino_vmf"}
    assert [g["seeds"] for g in first["groups"]] == [[0], [0]]
    files = list(output.glob("runs/*/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    told = sweep(output, pictures, "compare", *arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    if launcher == "basic":
        assert told.count("finished before") == 2


@pytest.mark.slow
def test_ablation_and_two_processes_a_run(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sweep(
        output, pictures, "ablation", "normalizations=[none,vmf]", "centerings=[probability]",
        "seeds=[0]", overrides=[*OVERRIDES, "devices=2", "strategy=ddp"],
    )  # fmt: skip
    summary = json.loads((output / "ablation.json").read_text())
    cells = [(g["normalization"], g["centering"]) for g in summary["groups"]]
    assert cells == [("none", "probability"), ("vmf", "probability")]
    assert all(len(g["metrics"]["knn_k1"]["values"]) == 1 for g in summary["groups"])
