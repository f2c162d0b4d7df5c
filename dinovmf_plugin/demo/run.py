"""The demo from pictures to page; see ``configs/demo.yaml`` for its settings."""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin import registry
from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.comparison.candidates import Candidate, compose_recipe
from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.data.module import pretrain_loader, validation_loader
from dinovmf_plugin.demo.history import EpochHistory, LabelledImages, evaluate
from dinovmf_plugin.demo.report import write_report
from dinovmf_plugin.evaluation.features import PixelFeatures
from dinovmf_plugin.host.config import parse_cfg
from dinovmf_plugin.pretraining import build_method, pretrain

__all__ = ["run_demo"]


def _recipe(cfg: DictConfig, method: str, folder: Path) -> DictConfig:
    """The demo's recipe for one method: what ``main_pretrain --config-name demo_recipe`` would run."""
    settings: Any = OmegaConf.to_container(cfg.method_settings)
    return compose_recipe(
        "demo_recipe",
        Candidate(method, settings=settings.get(method, {})),
        seed=cfg.seed,
        overrides=list(cfg.overrides),
        data={"train_path": str(folder / "train"), "val_path": str(folder / "val")},
        checkpoint_dir=str(Path(cfg.output_dir) / "checkpoints"),
    )


def _images(recipe: DictConfig, train: bool) -> LabelledImages:
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


def _monitor(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "monitor.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _versions() -> dict[str, str]:
    packages = ("dinovmf-plugin", "solo-learn", "torch", "lightning", "timm", "nvidia-dali-cuda130")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run_demo(cfg: DictConfig) -> dict[str, Any]:
    """Build the pictures, pre-train every method, evaluate the teachers, write the report.

    Args:
        cfg: ``configs/demo.yaml``.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: if a method is unknown.
        FileExistsError: if ``output_dir`` holds the results of an earlier demo.
    """
    output = Path(cfg.output_dir)
    if (output / "results.json").exists():
        raise FileExistsError(
            f"output_dir={output} holds an earlier demo: choose another one, or remove it"
        )
    for method in cfg.methods:
        if method not in registry.method_classes():
            known = ", ".join(sorted(registry.method_classes()))
            raise ValueError(f"methods={method!r} is unknown: choose from {known}")
    started = time.monotonic()
    pictures = demo_data.build(output / "data", cfg.dataset, fraction=cfg.fraction)
    first = parse_cfg(_recipe(cfg, cfg.methods[0], pictures))
    bank, queries = _images(first, True), _images(first, False)
    ks = list(cfg.knn.ks)

    def knn(network: nn.Module) -> dict[str, dict[str, float]]:
        return _percent(evaluate(network, bank, queries, ks, cfg.knn.temperature)[0])

    results: dict[str, Any] = {
        "data": json.loads((pictures / "about.json").read_text()),
        "images": {
            "train": sum(map(len, (y for _, y in bank))),
            "val": sum(len(y) for _, y in queries),
        },
        "baselines": {"pixels": knn(PixelFeatures()), "untrained": knn(_untrained(first))},
        "methods": {},
    }
    sample = next(iter(pretrain_loader(first)))
    trained = {}
    for method in cfg.methods:
        print(f"\n== {method} ==", flush=True)
        recipe = _recipe(cfg, method, pictures)
        history = EpochHistory(bank, queries, cfg.knn.k, cfg.knn.temperature, cfg.knn.every)
        began = time.monotonic()
        checkpoint = pretrain(recipe, [history])
        assert checkpoint is not None
        teacher, _ = load_backbone(checkpoint)
        trained[method] = teacher
        results["methods"][method] = {
            "knn": knn(teacher),
            "seconds": round(time.monotonic() - began, 1),
            "evaluation_seconds": round(history.evaluation_seconds, 1),
            "checkpoint": str(checkpoint.relative_to(output)),
            "settings": OmegaConf.to_container(recipe.method_kwargs, resolve=True),
            "epochs": history.epochs,
            "monitor": {
                kind: _monitor(checkpoint.parent, kind) for kind in ("step", "epoch", "alarm")
            },
        }
    key = f"k{cfg.knn.k}"
    floor = results["baselines"]["untrained"][key]["top1"]
    for result in results["methods"].values():
        result["gain_over_untrained"] = round(result["knn"][key]["top1"] - floor, 2)
    results["settings"] = OmegaConf.to_container(cfg, resolve=True)
    results["recipe"] = OmegaConf.to_container(first, resolve=True)
    results["versions"] = _versions()
    results["seconds"] = round(time.monotonic() - started, 1)
    write_report(
        output / "report.html", results, sample[1], trained, pictures, (bank, queries), first
    )
    temporary = output / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(output / "results.json")
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
