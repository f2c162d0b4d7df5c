"""From a config to results.json and report.html: checks first, then one evaluation after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinovmf_plugin.core.distributed import Processes, launched_processes
from dinovmf_plugin.core.vit import has_tokens, patch_grid
from dinovmf_plugin.evaluation.page import evaluation_page
from dinovmf_plugin.evaluation.protocols import PROTOCOLS, evaluation_settings
from dinovmf_plugin.evaluation.settings import EvaluationSettings
from dinovmf_plugin.evaluation.workbench import Images, Run, Workbench
from dinovmf_plugin.features.extraction import resolve_feature
from dinovmf_plugin.features.network import Network, load_network, load_source, untrained_like
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.runs.settings import plain

__all__ = ["check_evaluation", "evaluate", "evaluate_one"]

Results = Mapping[str, Any]


def _networks(settings: EvaluationSettings, main: Network | None) -> list[Network]:
    main = main or load_source(settings, seed=settings.seed)
    baselines = {
        "untrained": lambda: untrained_like(main, settings.seed),
        "pixels": lambda: load_network("pixels"),
    }
    networks = [main, *(baselines[name]() for name in settings.baselines)]
    labels = [network.label for network in networks]
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"checkpoint={settings.checkpoint} with baselines={list(settings.baselines)} would compare "
            f"a network with itself ({', '.join(labels)})"
        )
    return networks


def _evaluate_network(
    network: Network,
    runs: Mapping[str, Run],
    settings: EvaluationSettings,
    images: Images,
    processes: Processes,
    device: torch.device,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (evaluation, result) as each is done."""
    cache = Path(settings.cache_dir or Path(settings.output_dir) / "features")
    bench = Workbench(network, settings, images, device, cache, processes)
    for name, run in runs.items():
        started = time.monotonic()
        result = run(bench)
        result["settings"] = asdict(settings.sections[name]) | network.statistics._asdict()
        result["seconds"] = round(time.monotonic() - started, 2)
        yield name, result
    network.model.to("cpu")


def _side_by_side(results: Results, record: Results) -> dict[str, Any]:
    return {**results, **record}


def check_evaluation(config: Mapping[str, Any], model: nn.Module) -> int:
    """Check settings and images as ``evaluate`` does, for a network that is still to be trained.

    Args:
        config: as ``evaluate`` takes it; its checkpoint is not read.
        model: the untrained network.

    Returns:
        The number of training images.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a setting or the images cannot be used.
    """
    settings = evaluation_settings(config)
    pick_device(settings.device)
    images = Images(settings)
    for name in settings.evaluations:
        section, prepare = settings.sections[name], PROTOCOLS[name].prepare
        for feature in section.wanted:
            resolve_feature(feature, model)
        size = section.transform.size
        try:
            if has_tokens(model):
                patch_grid(model, size, size)
        except ValueError as error:
            raise ValueError(f"{name}.crop_size={size}: {error}") from error
        if prepare is not None:
            prepare(section, images, settings)
    return len(images.train)


def evaluate(
    config: Mapping[str, Any],
    evaluations: Sequence[str] | None = None,
    file: str = "results",
    layout: Callable[[Results, Results], dict[str, Any]] = _side_by_side,
    network: Network | None = None,
) -> dict[str, Any]:
    """Run the chosen evaluations of one network, and of baselines beside it.

    Writes ``FILE.json`` (after every evaluation, so that a stopped run loses only the current one),
    ``FILE.html`` and the features into ``output_dir``. Under ``torchrun`` the images are shared between
    the processes.

    Args:
        config: hydra's, or plain containers; see ``protocols.AllSettings`` and configs/evaluate.yaml.
        evaluations: by default ``config["evaluations"]``.
        file: stem of the written files.
        layout: makes the content of the JSON file of the results and the record of the run.
        network: what ``checkpoint`` names, where it is loaded already.

    Returns:
        One key per evaluation, ``baselines`` (the same per baseline), ``checkpoint``, ``settings``,
        ``versions``, ``started`` and ``seconds``.

    Raises:
        FileNotFoundError: if the checkpoint or a folder is missing.
        ValueError: if a setting, the images or the network cannot be used.
    """
    config = plain(config)
    settings = evaluation_settings(config, evaluations)
    device = pick_device(settings.device)
    # from cheap to dear: the file, the features' names, the listings of images; only then the passes
    networks = _networks(settings, network)
    main = networks[0]
    for name in settings.evaluations:
        for feature in settings.sections[name].wanted:
            resolve_feature(feature, main.model)
    images = Images(settings)
    protocols = [PROTOCOLS[name] for name in settings.evaluations]
    runs = {
        protocol.name: protocol.prepare(settings.sections[protocol.name], images, settings)
        for protocol in protocols
        if protocol.prepare is not None
    }
    output = Path(settings.output_dir)
    results: dict[str, Any] = {}
    record: dict[str, Any] = {
        "baselines": {baseline.label: {} for baseline in networks[1:]},
        "checkpoint": main.record,
        "settings": {key: value for key, value in config.items() if key != "hydra"},
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
    }
    started = time.monotonic()
    with launched_processes(device) as processes:
        record["processes"] = processes.world_size
        first = processes.rank == 0
        if first:
            # features are kept under the digests of what made them: nothing to bind
            open_run_folder(output, results=(f"{file}.json", f"{file}.html"))
        by_network: dict[str, dict[str, Any]] = {}
        for one in networks:
            found = by_network.setdefault(one.label, {})
            pairs = _evaluate_network(one, runs, settings, images, processes, device)
            for name, result in pairs:
                found[name] = result
                (results if one is main else record["baselines"][one.label])[name] = result
                record["seconds"] = round(time.monotonic() - started, 2)
                if first:
                    write_json(output / f"{file}.json", layout(results, record))
        if first:
            for protocol in protocols:
                ours = {label: found[protocol.name] for label, found in by_network.items()}
                print(protocol.text(ours), end="\n\n")
            architecture = main.shape.name if main.shape is not None else None
            page = evaluation_page(
                protocols,
                by_network,
                architecture,
                f"Evaluation of {main.label}",
                _page_record(record),
            )
            write_file(output / f"{file}.html", page.html())
            print(f"{output / file}.json, {output / file}.html")
    return layout(results, record)


def _page_record(record: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in record.items() if key != "baselines"}
    checkpoint = record["checkpoint"]
    words = [Path(str(checkpoint["checkpoint"])).name]
    words += [str(checkpoint[key]) for key in ("which", "architecture") if key in checkpoint]
    return {"subtitle": " · ".join(words), **json.loads(json.dumps(shown, default=str))}


def evaluate_one(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Run a single evaluation; its result's keys (such as ``k10``) are at the top of ``NAME.json``.

    The record of the run stays beside them, its whole config as ``run_settings``.
    """

    def flat(results: Results, record: Results) -> dict[str, Any]:
        mine = dict(results[name])
        beside = {key: value for key, value in record.items() if key not in mine}
        beside["baselines"] = {
            label: found[name] for label, found in record["baselines"].items() if name in found
        }
        return {**mine, **beside, "run_settings": record["settings"]}

    return evaluate(config, [name], name, flat)
