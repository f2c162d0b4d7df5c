"""Training of one run: in this process, or in one of its own where Lightning starts several."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin.data.module import validation_loader
from dinovmf_plugin.features.checks import NonFiniteFeaturesError
from dinovmf_plugin.features.extraction import extract_features
from dinovmf_plugin.features.knn import knn_accuracy
from dinovmf_plugin.runs.files import write_json
from dinovmf_plugin.training.config import count_devices, parse_cfg
from dinovmf_plugin.training.curve import CurveRecorder

__all__ = ["train"]


def _knn(cfg: DictConfig, k: int, network: nn.Module) -> float:
    """Top-1 of a network, on one process alone; the images were checked before training."""
    if not OmegaConf.select(cfg, "data.skip_unreadable"):
        cfg = OmegaConf.merge(cfg, {"data": {"check_images": "none"}})  # type: ignore[assignment]
    device = next(network.parameters()).device
    loaders = (validation_loader(cfg, train=True), validation_loader(cfg))
    (bank, labels), (queries, query_labels) = (
        extract_features(network, loader, "cls", device, progress=False) for loader in loaders
    )
    k = min(k, len(bank))
    return knn_accuracy(bank, labels, queries.to(device), query_labels, ks=[k])[k][0]


def _train_here(recipe: DictConfig, curve_every: int, k: int) -> dict[str, Any]:
    """Train and return ``{"checkpoint": path, "diverged": message or None}``."""
    from dinovmf_plugin.methods.base import NonFiniteLossError
    from dinovmf_plugin.pretraining import pretrain

    parsed = parse_cfg(recipe.copy())
    recorder = CurveRecorder(partial(_knn, parsed, k), curve_every)
    try:
        checkpoint = pretrain(recipe, [recorder])
    except (NonFiniteLossError, NonFiniteFeaturesError) as error:
        return {"checkpoint": None, "diverged": str(error)}
    return {"checkpoint": str(checkpoint), "diverged": None}


def train(recipe: DictConfig, curve_every: int, k: int) -> dict[str, Any]:
    """Pre-train one run; a run that was interrupted goes on from its newest whole checkpoint.

    Lightning starts the other processes of a multi-GPU run by repeating the command line. Within a hydra
    sweep that would repeat the sweep, so such a run gets a command line of its own.

    Args:
        recipe: unparsed, with ``checkpoint`` and ``auto_resume`` enabled.
        curve_every: epochs between two kNN evaluations; 0 is never.
        k: neighbors of these.

    Returns:
        ``checkpoint``: path of the last one (None if the run diverged), and ``diverged``: None, or what
        became NaN or infinite, the loss or the features of the evaluation while training.

    Raises:
        ValueError: if the recipe cannot be trained from here.
        RuntimeError: if the process of a multi-GPU run failed.
    """
    nodes = int(recipe.get("num_nodes", 1) or 1)
    if nodes > 1:
        raise ValueError(
            f"num_nodes={nodes}: a sweep trains each run on one node; train runs that need several with "
            "scripts/main_pretrain.py under srun"
        )
    accelerator = str(recipe.get("accelerator", "auto"))
    if count_devices(recipe.get("devices", 1), accelerator) == 1:
        return _train_here(recipe, curve_every, k)
    return _train_in_own_process(recipe, curve_every, k)


def _train_in_own_process(recipe: DictConfig, curve_every: int, k: int) -> dict[str, Any]:
    folder = Path(recipe.checkpoint.dir) / "launched"
    folder.mkdir(parents=True, exist_ok=True)
    file, outcome = folder / f"{recipe.name}.yaml", folder / f"{recipe.name}.json"
    OmegaConf.save(recipe, file, resolve=True)
    outcome.unlink(missing_ok=True)
    # Lightning would take the scheduler's single task for its own number of processes
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_NTASKS"}
    command = [sys.executable, "-m", __name__, str(file), str(outcome)]
    command += ["--curve-every", str(curve_every), "-k", str(k)]
    code = subprocess.run(command, env=environment, check=False).returncode
    if not outcome.is_file():
        raise RuntimeError(f"training of {recipe.name} failed with exit status {code}; see above")
    found: dict[str, Any] = json.loads(outcome.read_text())
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("outcome", type=Path)
    parser.add_argument("--curve-every", type=int, default=0)
    parser.add_argument("-k", type=int, default=10)
    arguments = parser.parse_args()
    recipe = OmegaConf.load(arguments.recipe)
    assert isinstance(recipe, DictConfig)
    found = _train_here(recipe, arguments.curve_every, arguments.k)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        write_json(arguments.outcome, found)


if __name__ == "__main__":
    _main()
