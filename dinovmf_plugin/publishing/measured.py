"""The numbers that were measured of a checkpoint, found in the JSON files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin.checkpoints.card import Measured
from dinovmf_plugin.checkpoints.layouts import StoredWeights
from dinovmf_plugin.evaluation.finetuning import FINETUNE
from dinovmf_plugin.evaluation.protocols import PROTOCOLS
from dinovmf_plugin.report.numbers import percent
from dinovmf_plugin.report.tables import Table
from dinovmf_plugin.runs.files import file_digest
from dinovmf_plugin.training.curve import read_curve, read_monitor

__all__ = ["measurements"]

_LABEL = "these weights"
_SET_ASIDE = re.compile(r"\.\d+$")  # results.1.json: see runs.files.keep_previous


def _files(place: Path) -> list[Path]:
    """The JSON files of a folder and of the folders in it, or one file."""
    if not place.is_dir():
        return [place]
    found = sorted({*place.glob("*.json"), *place.glob("*/*.json")})
    return [path for path in found if not _SET_ASIDE.search(path.stem)]


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _about(content: Mapping[str, Any], digest: str, which: str) -> bool:
    """Whether the results are those of this very file, and of the same network in it."""
    record = content.get("checkpoint")
    if isinstance(record, Mapping):
        return record.get("sha256") == digest and record.get("which") in (which, None)
    settings = content.get("settings")
    digests = settings.get("sha256") if isinstance(settings, Mapping) else None
    ours = isinstance(digests, Mapping) and digests.get("checkpoint") == digest
    return ours and content.get("which") in (which, None)


def _protocols(path: Path, content: Mapping[str, Any]) -> Iterator[Table]:
    """The evaluations of frozen features: several in one file, or one alone (``knn.json``)."""
    baselines = content.get("baselines") or {}
    for name, protocol in PROTOCOLS.items():
        alone = path.stem == name and "run_settings" in content
        result = content if alone else content.get(name)
        if isinstance(result, Mapping):
            others = {k: v if alone else v.get(name) for k, v in baselines.items()}
            found = {label: other for label, other in others.items() if other}
            yield protocol.rows({_LABEL: result, **found}, [])


def _retrieval(content: Mapping[str, Any]) -> Table:
    scores = content["scores"]
    values = [percent(100 * score["mAP"]) for score in scores.values()]
    return Table([f"{content['dataset']}, mAP (%)", *scores], [[_LABEL, *values]])


def _video(content: Mapping[str, Any]) -> Table:
    names = ("J&F-Mean", "J-Mean", "F-Mean")
    rows = [
        [label, *(percent(100 * content[key][name]) for name in names)]
        for label, key in ((_LABEL, "scores"), ("copying the first mask", "copy_first_mask"))
    ]
    return Table([f"DAVIS {content['split']} (%)", "J&F", "J", "F"], rows)


def _analysis(content: Mapping[str, Any]) -> Table:
    at = str(content["void_set"]["threshold"])
    header = ["mixture", "components", f"unique (cosine {at})", "that win an image", "perplexity"]
    usage = content["usage"]
    row = [_LABEL, content["num_prototypes"], content["utilization"]["greedy"][at]["unique"]]
    return Table(header, [[*row, usage["winning_prototypes"], usage["usage_perplexity"]]])


def _tables(path: Path, content: Mapping[str, Any]) -> list[Table]:
    if content.get("task") == "retrieval":
        return [_retrieval(content)]
    if content.get("task") == "video segmentation":
        return [_video(content)]
    if "void_set" in content:
        return [_analysis(content)]
    if "runs" in content and "best" in content:
        return [FINETUNE.rows({_LABEL: content}, [])]
    return list(_protocols(path, content))


def _source(path: Path, content: Mapping[str, Any]) -> str:
    settings = content.get("run_settings") or content.get("settings") or {}
    data = settings.get("data") if isinstance(settings, Mapping) else None
    val = data.get("val_path") if isinstance(data, Mapping) else None
    words = [f"`{path.name}`", f"dinovmf_plugin {content['versions']['dinovmf_plugin']}"]
    words += [f"started {content['started']}"] if "started" in content else []
    words += [f"images of `{Path(str(val)).name}`"] if val else []
    return ", ".join(words)


def _while_training(folder: Path, steps: int) -> list[Measured]:
    """What the monitor and the curve recorded when the weights were stored."""
    epochs = [record for record in read_monitor(folder)["epoch"] if record["step"] == steps]
    if not epochs:
        return []
    last = epochs[-1]
    curve = [record for record in read_curve(folder) if record["epoch"] == last["epoch"] + 1]
    loss, top1 = (curve[-1].get(key) if curve else None for key in ("loss", "top1"))
    rows = [
        ["loss of the epoch", loss],
        ["kNN top-1 (%)", percent(top1)],
        ["perplexity of the components' usage", last["usage_perplexity"]],
        ["unique components", int(last["unique_prototypes"])],
        ["of examined", int(last["examined_prototypes"])],
    ]
    table = Table([f"while training, step {steps:,}", ""], [r for r in rows if r[1] is not None])
    return [Measured(table, "`monitor.jsonl` and `curve.jsonl` of the run, on training images")]


def measurements(stored: StoredWeights, *, results: Sequence[str | Path] = ()) -> list[Measured]:
    """Scores of the weights of a file, as tables for their model card.

    Looks into the JSON files of the file's folder and of the folders in it; results of other weights are
    told by their digest and left out.

    Args:
        stored: as read from the file.
        results: further files of results, or folders.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one of ``results`` holds nothing about these weights, or cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.pth"
        >>> _ = path.write_bytes(b"weights")
        >>> measurements(StoredWeights(path, "dino", "teacher", {}))
        []
    """
    checkpoint, which, steps = stored.path, stored.which, stored.steps
    digest = file_digest(checkpoint)
    given = [Path(place) for place in results]
    for place in given:
        if not place.exists():
            raise FileNotFoundError(f"--results {place} does not exist")
    by_path: dict[Path, list[Measured]] = {}
    for place in (checkpoint.parent, *given):
        here = 0
        for path in _files(place):
            content = _content(path)
            if not _about(content, digest, which):
                continue
            try:
                tables = _tables(path, content)
                found = [Measured(table, _source(path, content)) for table in tables]
            except (KeyError, TypeError, AttributeError, StopIteration) as error:
                raise ValueError(
                    f"{path} holds results of this checkpoint in another form than this version writes "
                    f"({type(error).__name__}: {error}): evaluate again, or move it away"
                ) from error
            by_path[path.resolve()] = found
            here += len(found)
        if place in given and not here:
            raise ValueError(
                f"--results {place} holds no results of {checkpoint.name} as it is now (its SHA-256 is "
                f"compared) for the {which}"
            )
    own = [] if steps is None else _while_training(checkpoint.parent, steps)
    return [*own, *(one for found in by_path.values() for one in found)]
