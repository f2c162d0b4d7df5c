"""One run of a comparison: pre-train, evaluate the teacher, look at the prototypes, write result.json."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dinovmf_plugin import registry
from dinovmf_plugin.analysis.measurements import measure_prototypes
from dinovmf_plugin.comparison.devices import lease_gpu
from dinovmf_plugin.comparison.launch import train
from dinovmf_plugin.comparison.outcome import outcome_of
from dinovmf_plugin.comparison.shared import RunSettings
from dinovmf_plugin.core.distributed import Processes
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.evaluation.protocols import evaluation_settings
from dinovmf_plugin.evaluation.runner import check_evaluation, evaluate
from dinovmf_plugin.evaluation.workbench import Images, Workbench
from dinovmf_plugin.features.checks import NonFiniteFeaturesError, first_non_finite_row
from dinovmf_plugin.features.images import ImageSet, image_folder
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import Network, load_network
from dinovmf_plugin.pretraining import build_method
from dinovmf_plugin.runs.environment import machine, pick_device, versions
from dinovmf_plugin.runs.files import keep_previous, write_json
from dinovmf_plugin.runs.sources import SourceKeys
from dinovmf_plugin.training.config import parse_cfg
from dinovmf_plugin.training.curve import read_curve, read_monitor
from dinovmf_plugin.training.folders import choose_folder, find_checkpoint, run_identity

__all__ = ["flat_metrics", "run_one"]

RESULT = "result.json"
_ROWS = 4096


def flat_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 accuracies in percent under one name each.

    ``knn_k10``, ``linear_cls`` (the epoch and rate of DINO's report: the best on the validation set),
    ``few_shot_1 per class`` (mean over the splits), ``transfer`` (average over the data sets).

    Example:
        >>> flat_metrics({"knn": {"k10": {"top1": 71.0, "top5": 90.0}, "val_images": 7}})
        {'knn_k10': 71.0}
    """
    found: dict[str, float] = {}
    for key, value in evaluation.get("knn", {}).items():
        if key.startswith("k") and key[1:].isdigit():
            found[f"knn_{key}"] = value["top1"]
    for feature, report in evaluation.get("linear", {}).get("features", {}).items():
        chosen = report.get("chosen") or report["best"]
        found[f"linear_{feature}"] = chosen["top1"]
    for setting, report in evaluation.get("few_shot", {}).get("top1", {}).items():
        found[f"few_shot_{setting}"] = report["mean"]
    if "transfer" in evaluation:
        found["transfer"] = evaluation["transfer"]["average"]["protocol_metric"]
    return found


def _identity(recipe: DictConfig, settings: RunSettings) -> str:
    """The run's identity (see ``run_identity``) together with how it is evaluated."""
    shared = settings.comparison.identity()
    keys = ("image_size", "k", "evaluations", "baselines", "thresholds", "evaluation")
    text = json.dumps({key: shared[key] for key in keys}, sort_keys=True, default=str)
    return f"{run_identity(recipe)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@torch.no_grad()
def _embeddings(bench: Workbench, images: ImageSet, transform: CenterCrop) -> Tensor:
    """The head's unit vectors ``(N, p)``, from the CLS features that kNN has left in the cache."""
    network = bench.backbone
    features = bench.features(images, {"cls": "cls"}, transform)[0]["cls"]
    head = network.mixture_head[0]
    y = torch.cat([head(rows.to(network.device)).float().cpu() for rows in features.split(_ROWS)])
    bad = first_non_finite_row(y)
    if bad is not None:
        raise NonFiniteFeaturesError(
            f"{network.record['checkpoint']}: the embedding of {images.describe_image(bad)} is NaN or "
            "infinite"
        )
    return y


def _prototypes(
    network: Network, config: Mapping[str, Any], recipe: DictConfig, settings: RunSettings
) -> dict[str, Any] | None:
    """Utilization, void set, usage and concentrations of the plugin's methods; None for others.

    Beside them ``held_out_log_likelihood``: the mean of ``log p(y)`` over the validation images, in nats, of
    the teacher's mixture as ``scripts/analyze.py`` makes it (``weights=model``).
    """
    if network.head is None:
        return None
    checked = evaluation_settings(config)
    device = pick_device(checked.device)
    network.to(device)
    cache = Path(config["cache_dir"])
    bench = Workbench(network, checked, Images(checked), device, cache, Processes())
    transform = bench.transform(checked.sections["knn"])

    def embeddings(key: str) -> Tensor:
        images = image_folder(
            recipe.data[key],
            f"data.{key}",
            labeled="auto",
            fraction=recipe.data.fraction,
            keys=SourceKeys.of(recipe.data),
        )
        return _embeddings(bench, images, transform)

    thresholds = settings.comparison.thresholds
    found = measure_prototypes(network, embeddings("train_path"), thresholds, components=False)[0]
    mixture = make_mixture(network, "model")
    held_out = mixture.log_likelihood(embeddings("val_path"))
    return found | {"held_out_log_likelihood": float(held_out.mean())}


def _evaluation_config(
    checkpoint: str, recipe: DictConfig, settings: RunSettings, folder: Path
) -> dict[str, Any]:
    shared = settings.comparison
    size = shared.image_size or int(OmegaConf.select(recipe, "backbone.kwargs.img_size") or 224)
    data = {key: recipe.data[key] for key in ("train_path", "val_path")}
    data |= asdict(SourceKeys.of(recipe.data))
    config = shared.evaluation_config(checkpoint, str(folder), size, data)
    config["progress"] = bool(shared.evaluation.get("progress", True))
    return config


def _check_before_training(recipe: DictConfig, settings: RunSettings, folder: Path) -> None:
    """Whatever the evaluation would refuse after the training is refused before it.

    Raises:
        ValueError, FileNotFoundError: naming the key.
    """
    shared = settings.comparison
    config = _evaluation_config("untrained", recipe, settings, folder)
    backbone = build_method(recipe.copy()).backbone
    bank = check_evaluation({**config, "baselines": list(shared.baselines)}, backbone)
    if shared.k > bank:
        raise ValueError(f"k={shared.k}: data.train_path holds only {bank} images")


def _baselines(
    network: Network, config: Mapping[str, Any], settings: RunSettings
) -> dict[str, Any]:
    """What kNN gives without training: measured by one run for all of its architecture, then read.

    Kept in ``output_dir/baselines/<digest>.json``; the page is in the folder of the run that measured it.
    """
    shared = settings.comparison
    names = list(shared.baselines)
    # all other settings bind output_dir
    made_of = [str(network.shape), network.statistics, config["data"], config["knn"]]
    text = json.dumps(made_of, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    file = Path(shared.output_dir) / "baselines" / f"{digest}.json"
    if not file.is_file():
        measured = evaluate({**config, "baselines": names}, ["knn"], "baselines", network=network)
        write_json(file, measured["baselines"])
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _evaluate(
    checkpoint: str, recipe: DictConfig, settings: RunSettings, folder: Path
) -> dict[str, Any]:
    shared = settings.comparison
    config = _evaluation_config(checkpoint, recipe, settings, folder)
    ours = recipe.method in registry.method_classes()
    network = load_network(checkpoint, head=ours)
    found = evaluate(config, file="evaluation", network=network)
    baselines: dict[str, Any] = {}
    if shared.baselines:
        # the features of the trained network are in the cache: only the baselines cost anything
        baselines = _baselines(network, config, settings)
    prototypes = _prototypes(network, config, recipe, settings)
    if not shared.keep_features:
        shutil.rmtree(config["cache_dir"], ignore_errors=True)
    return {
        "evaluation": {name: found[name] for name in shared.evaluations},
        "metrics": flat_metrics(found),
        "baselines": {name: flat_metrics(value) for name, value in baselines.items()},
        "prototypes": prototypes,
    }


def run_one(settings: RunSettings) -> dict[str, Any]:
    """Train and evaluate one run, unless its finished result is there.

    The run's folder is ``<output_dir>/runs/<method>/<name>-<identity>``. An interrupted run goes on from
    its newest whole checkpoint; a run whose loss became NaN or infinite is a result too.

    Returns:
        What ``result.json`` in the run's folder holds.

    Raises:
        ValueError, FileNotFoundError: for anything wrong in the settings, before training.
    """
    shared = settings.comparison
    recipe = settings.recipe()
    if shared.uses_demo(recipe):
        shared.build_demo()
    if shared.gpus is not None:
        lease_gpu(shared.gpus, shared.output_dir)
    parsed = parse_cfg(recipe.copy())
    identity = _identity(parsed, settings)
    found = find_checkpoint(parsed)
    folder = choose_folder(parsed, found)
    previous = _finished(folder, identity)
    if previous is not None:
        print(f"{recipe.name}: finished before ({folder / RESULT})", flush=True)
        return previous
    keep_previous(folder / RESULT)
    print(f"{recipe.name}: {'going on' if found else 'training'} in {folder}", flush=True)
    began, started = time.monotonic(), datetime.now(UTC)
    _check_before_training(parsed, settings, folder)
    outcome = train(recipe, shared.curve_every, shared.k)
    trained = time.monotonic()
    result: dict[str, Any] = {
        "identity": identity,
        "label": settings.candidate.label,
        "method": parsed.method,
        "normalization": parsed.method_kwargs.get("normalization"),
        "centering": parsed.method_kwargs.get("centering"),
        "seed": settings.seed,
        "lr": settings.lr,
        "diverged": outcome["diverged"],
        "checkpoint": None,
        "evaluation": {},
        "metrics": {},
        "baselines": {},
        "prototypes": None,
        "resumed_from": found.name if found else None,
        "curve": read_curve(folder),
        "monitor": read_monitor(folder),
    }
    if outcome["checkpoint"] is not None:
        result["checkpoint"] = Path(outcome["checkpoint"]).name
        try:
            result |= _evaluate(outcome["checkpoint"], parsed, settings, folder)
        except NonFiniteFeaturesError as error:  # the last step broke it
            result["diverged"] = str(error)
    result["outcome"] = outcome_of(result, parsed.method_kwargs.get("num_prototypes"), shared.k)
    result |= {
        "started": started.isoformat(timespec="seconds"),
        "seconds": {
            "training": round(trained - began, 1),
            "evaluation": round(time.monotonic() - trained, 1),
        },
        "machine": machine(),
        "versions": versions(),
        "recipe": OmegaConf.to_container(parsed, resolve=True),
        "settings": shared.identity(),
    }
    write_json(folder / RESULT, result)
    knn = result["metrics"].get(f"knn_k{shared.k}")
    told = result["outcome"] if knn is None else f"kNN {knn:.1f} %, {result['outcome']}"
    print(f"{recipe.name}: {told} ({sum(result['seconds'].values()):.0f} s)", flush=True)
    return result


def _finished(folder: Path, identity: str) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result.get("identity") == identity else None
