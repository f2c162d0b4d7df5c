"""The demo from pictures to page; see ``configs/demo.yaml`` for its settings."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.data.module import validation_loader
from dinovmf_plugin.demo.components import look_inside
from dinovmf_plugin.demo.report import LabeledImages, write_report
from dinovmf_plugin.demo.settings import DemoSettings
from dinovmf_plugin.demo.training import default_processes, train_all
from dinovmf_plugin.features.extraction import PixelFeatures, extract_features
from dinovmf_plugin.features.knn import knn_accuracy
from dinovmf_plugin.pretraining import build_method
from dinovmf_plugin.recipes import Candidate, compose_recipe
from dinovmf_plugin.runs.files import write_json
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.runs.settings import read
from dinovmf_plugin.training.config import parse_cfg
from dinovmf_plugin.training.crops import SHEET
from dinovmf_plugin.training.curve import read_curve, read_monitor

__all__ = ["run_demo"]


def _recipe(settings: DemoSettings, method: str, folder: Path) -> DictConfig:
    """The demo's recipe for one method: what ``main_pretrain --config-name demo_recipe`` would run."""
    return compose_recipe(
        "demo_recipe",
        Candidate(method, settings=settings.method_settings.get(method, {})),
        seed=settings.seed,
        overrides=list(settings.overrides),
        data={"train_path": str(folder / "train"), "val_path": str(folder / "val")},
        checkpoint_dir=str(Path(settings.output_dir) / "checkpoints"),
    )


def _images(recipe: DictConfig, train: bool) -> LabeledImages:
    return [(x.clone(), y.clone()) for x, y in validation_loader(recipe, train=train)]


def _percent(accuracy: dict[int, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {
        f"k{k}": {"top1": round(top1, 2), "top5": round(top5, 2)}
        for k, (top1, top5) in accuracy.items()
    }


def _untrained(recipe: DictConfig) -> nn.Module:
    """The backbone that every method starts from: the same seed gives the same weights."""
    torch.manual_seed(recipe.seed)
    return build_method(recipe.copy()).momentum_backbone


def _versions() -> dict[str, str]:
    packages = ("dinovmf-plugin", "solo-learn", "torch", "lightning", "timm", "nvidia-dali-cuda130")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run_demo(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the pictures, pre-train every method, evaluate the teachers, write the report.

    Args:
        config: ``configs/demo.yaml``, hydra's or plain; see ``settings.DemoSettings``.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: for a setting that cannot work, or if ``output_dir`` holds a demo of other settings.
    """
    settings = read(DemoSettings, config)
    free = ("output_dir", "processes")
    bound = {key: value for key, value in asdict(settings).items() if key not in free}
    output = open_run_folder(settings.output_dir, bound, ("results.json", "report.html"))
    started = time.monotonic()
    pictures = demo_data.build(output / "data", settings.dataset, fraction=settings.fraction)
    first = parse_cfg(_recipe(settings, settings.methods[0], pictures))
    bank, queries = _images(first, True), _images(first, False)
    ks = list(settings.knn.ks)

    def accuracy(network: nn.Module, ks: list[int]) -> dict[int, tuple[float, float]]:
        (features, labels), (query_features, query_labels) = (
            extract_features(network, images, progress=False) for images in (bank, queries)
        )
        inputs = features, labels, query_features, query_labels
        ks = [k for k in ks if k <= len(features)]
        return knn_accuracy(*inputs, ks=ks, temperature=settings.knn.temperature)

    def knn(network: nn.Module) -> dict[str, dict[str, float]]:
        return _percent(accuracy(network, ks))

    results: dict[str, Any] = {
        "data": json.loads((pictures / "about.json").read_text()),
        "images": {
            "train": sum(map(len, (y for _, y in bank))),
            "val": sum(len(y) for _, y in queries),
        },
        "baselines": {"pixels": knn(PixelFeatures()), "untrained": knn(_untrained(first))},
        "methods": {},
    }
    recipes = {method: _recipe(settings, method, pictures) for method in settings.methods}
    checkpoints = train_all(
        recipes,
        output / "checkpoints" / "launched",
        every=settings.knn.every,
        k=settings.knn.k,
        temperature=settings.knn.temperature,
        processes=default_processes(len(recipes))
        if settings.processes is None
        else settings.processes,
    )
    trained, inside = {}, {}
    size = int(first.backbone.kwargs.img_size)
    for method, checkpoint in checkpoints.items():
        teacher, _ = load_backbone(checkpoint)
        trained[method] = teacher
        inside[method] = look_inside(
            checkpoint, pictures, size, k=settings.knn.k, temperature=settings.knn.temperature
        )
        curve, monitor = read_curve(checkpoint.parent), read_monitor(checkpoint.parent)
        results["methods"][method] = {
            "knn": knn(teacher),
            "seconds": curve[-1]["seconds"],
            "checkpoint": str(checkpoint.relative_to(output)),
            "settings": OmegaConf.to_container(recipes[method].method_kwargs, resolve=True),
            "components": inside[method].measured,
            "epochs": curve,
            "monitor": monitor,
        }
        last: dict[str, Any] = next(iter(monitor["step"][-1:]), {})
        for name in ("target_information", "student_information", "loss_over_log_k"):
            results["methods"][method][name] = last.get(name)
    key = f"k{settings.knn.k}"
    floor = results["baselines"]["untrained"][key]["top1"]
    for result in results["methods"].values():
        result["gain_over_untrained"] = round(result["knn"][key]["top1"] - floor, 2)
    results["settings"] = asdict(settings)
    results["recipe"] = OmegaConf.to_container(first, resolve=True)
    results["versions"] = _versions()
    results["seconds"] = round(time.monotonic() - started, 1)
    sheet = next(iter(checkpoints.values())).parent / SHEET
    write_report(
        output / "report.html", results, sheet, trained, inside, pictures, (bank, queries), first
    )
    write_json(output / "results.json", results)
    _print_table(results, key, output)
    return results


def _print_table(results: dict[str, Any], key: str, output: Path) -> None:
    rows = {**results["baselines"], **{m: r["knn"] for m, r in results["methods"].items()}}
    print(f"\nkNN top-1 on {results['images']['val']} held-out images, {key}:")
    for name, accuracy in rows.items():
        gain = results["methods"].get(name, {}).get("gain_over_untrained")
        extra = "" if gain is None else f"   {gain:+.1f} points over the untrained backbone"
        print(f"  {name:<16}{accuracy[key]['top1']:6.1f} %{extra}")
    print(f"\n{output / 'results.json'}\n{output / 'report.html'}   ({results['seconds']:.0f} s)")
