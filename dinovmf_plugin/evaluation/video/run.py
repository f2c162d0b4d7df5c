"""The video segmentation evaluation from checkpoint to JSON."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dinovmf_plugin.core.vit import forward_tokens
from dinovmf_plugin.data.channels import IMAGENET, Statistics
from dinovmf_plugin.evaluation.video import davis
from dinovmf_plugin.evaluation.video import figures as video_figures
from dinovmf_plugin.evaluation.video.page import collect_sequences, object_table, video_page
from dinovmf_plugin.evaluation.video.propagation import (
    labels_from_soft_map,
    one_hot_labels,
    propagate,
)
from dinovmf_plugin.evaluation.video.scores import score_sequence
from dinovmf_plugin.evaluation.video.settings import VideoSettings
from dinovmf_plugin.features.network import load_source
from dinovmf_plugin.runs.environment import pick_device, versions
from dinovmf_plugin.runs.files import listing_digest, write_file, write_json
from dinovmf_plugin.runs.folder import open_run_folder

__all__ = ["evaluate_video_segmentation", "segment_sequence"]

Labels = NDArray[np.uint8]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def segment_sequence(
    vit: nn.Module,
    sequence: davis.VideoSequence,
    settings: VideoSettings,
    device: torch.device,
    on_frame: Callable[[], object] = lambda: None,
    statistics: Statistics = davis.PUBLISHED,
) -> tuple[list[Labels], dict[str, float]]:
    """Carry the first annotation through a sequence.

    Args:
        vit: the backbone, on ``device``.
        sequence: the video; only its first annotation is read.
        settings: size of the frames and the propagation's numbers.
        device: where it is computed.
        on_frame: called after every frame.
        statistics: what the frames are normalized by.

    Returns:
        Label numbers ``(H, W)`` of every frame, the first as annotated; and seconds per frame of
        ``backbone`` (with reading the frame) and ``propagation`` (with enlarging the labels).
    """
    patch_size: tuple[int, int] = tuple(vit.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
    size = davis.frame_size(sequence.height, sequence.width, settings.size, patch_size)
    grid = (size[0] // patch_size[0], size[1] // patch_size[1])
    first = davis.read_annotation(sequence.annotations[0])
    classes = int(first[first != davis.VOID].max()) + 1
    spent = 0.0

    def features() -> Iterator[Tensor]:
        nonlocal spent
        for path in sequence.frames:
            begun = _clock(device)
            frame = davis.read_frame(path, size, statistics)[None].to(device)
            tokens = forward_tokens(vit, frame)[0, vit.num_prefix_tokens :]
            spent += _clock(device) - begun
            yield tokens

    labels = one_hot_labels(davis.shrink_annotation(first, grid), classes).to(device)
    masks = [first]
    begun = _clock(device)
    for soft in propagate(
        features(),
        labels,
        grid,
        context_frames=settings.context_frames,
        radius=settings.radius,
        topk=settings.topk,
        temperature=settings.temperature,
    ):
        small = labels_from_soft_map(soft, grid, patch_size).cpu().numpy().astype(np.uint8)
        full = Image.fromarray(small).resize(
            (sequence.width, sequence.height), Image.Resampling.NEAREST
        )
        masks.append(np.array(full))
        on_frame()
    total, frames = _clock(device) - begun, len(sequence.frames) - 1
    return masks, {"backbone": spent / (frames + 1), "propagation": (total - spent) / frames}


def _mask_paths(folder: Path, sequence: davis.VideoSequence) -> list[Path]:
    return [folder / "masks" / sequence.name / f"{frame.stem}.png" for frame in sequence.frames]


def _score_path(folder: Path, sequence: davis.VideoSequence) -> Path:
    return folder / "scores" / f"{sequence.name}.json"


def _sheet_path(folder: Path, sequence: davis.VideoSequence) -> Path:
    return folder / "contact_sheets" / f"{sequence.name}.png"


def _animations(folder: Path, sequence: davis.VideoSequence) -> list[Path]:
    return [folder / "animations" / f"{sequence.name}.{kind}" for kind in ("webp", "gif")]


def _finished(folder: Path, sequence: davis.VideoSequence) -> bool:
    """Whether an earlier run wrote the scores, which it does last, for these very files, and their masks."""
    scores = _score_path(folder, sequence)
    if not scores.is_file() or not all(path.is_file() for path in _mask_paths(folder, sequence)):
        return False
    return bool(json.loads(scores.read_text()).get("files_digest") == _files_digest(sequence))


def _files_digest(sequence: davis.VideoSequence) -> str:
    return listing_digest((*sequence.frames, *sequence.annotations))


def _save_masks(folder: Path, sequence: davis.VideoSequence, masks: Sequence[Labels]) -> None:
    paths = _mask_paths(folder, sequence)
    final = paths[0].parent
    partial = final.with_name(f".{final.name}.partial")
    for leftover in (partial, final):  # of a run that stopped before it wrote the scores
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    for path, labels in zip(paths, masks, strict=True):
        davis.write_annotation(partial / path.name, labels)
    partial.rename(final)


def _run_sequence(
    vit: nn.Module,
    sequence: davis.VideoSequence,
    settings: VideoSettings,
    device: torch.device,
    folder: Path,
    on_frame: Callable[[], object],
    statistics: Statistics,
) -> None:
    digest = _files_digest(sequence)
    masks, seconds = segment_sequence(vit, sequence, settings, device, on_frame, statistics)
    for picture in (_sheet_path(folder, sequence), *_animations(folder, sequence)):
        picture.unlink(missing_ok=True)  # of other frames under the same names
    _save_masks(folder, sequence, masks)
    truth = [davis.read_annotation(path) for path in sequence.annotations]
    begun = time.perf_counter()
    scores = score_sequence(masks, truth)
    seconds["scoring"] = (time.perf_counter() - begun) / len(truth)
    result = {
        "sequence": sequence.name,
        "files_digest": digest,
        "frames": len(sequence.frames),
        "objects": scores,
        "copy_first_mask": score_sequence([truth[0]] * len(truth), truth),
        "seconds_per_frame": seconds,
        "device": str(device),
    }
    write_json(_score_path(folder, sequence), result)


def _draw(folder: Path, sequence: davis.VideoSequence, settings: VideoSettings) -> None:
    """Make the pictures that are wanted and not there yet."""
    sheet = _sheet_path(folder, sequence)
    animation = folder / "animations" / f"{sequence.name}.{settings.animation}"
    want_sheet = settings.contact_sheet and not sheet.is_file()
    want_animation = settings.animation is not None and not animation.is_file()
    if not want_sheet and not want_animation:
        return
    truth = [davis.read_annotation(path) for path in sequence.annotations]
    ours = [davis.read_annotation(path) for path in _mask_paths(folder, sequence)]
    if want_sheet:
        picture = video_figures.contact_sheet(sequence.frames, truth, ours)
        write_file(sheet, lambda file: picture.save(file, format="PNG"))
    if want_animation:
        video_figures.save_animation(animation, sequence.frames, truth, ours)


def evaluate_video_segmentation(settings: VideoSettings) -> dict[str, Any]:
    """Segment every sequence from its first annotation and score it as DAVIS-2017 does.

    Writes into ``output_dir``: ``masks/SEQUENCE/*.png`` (what DAVIS's own tool reads),
    ``scores/SEQUENCE.json``, ``per_sequence.csv``, ``results.json``, ``report.html``, contact sheets
    and animations. A sequence whose scores are there is not computed again.

    Returns:
        What ``results.json`` holds: ``scores`` as fractions, those of copying the first mask, every
        sequence, seconds per frame, settings and versions.

    Raises:
        FileNotFoundError: if the checkpoint, a folder, a frame or an annotation is missing.
        ValueError: if a setting, an image or the output folder cannot be used.
    """
    device = pick_device(settings.device)
    sequences = davis.find_sequences(
        settings.data_path,
        split=settings.split,
        year=settings.year,
        resolution=settings.resolution,
        only=settings.sequences,
    )
    network = load_source(settings, seed=settings.seed)
    vit = network.vit.to(device)  # what has no tokens must not bind the folder to itself
    bound: dict[str, Any] = {
        "task": "video segmentation",
        "network": network.identity,
        "data": str(Path(settings.data_path).resolve()),
    }
    # those of the published numbers are ImageNet's but for a slip of 0.001
    own = network.statistics
    statistics = davis.PUBLISHED if own == IMAGENET else own
    bound |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    for key in ("resolution", "size", "context_frames", "radius", "topk", "temperature"):
        bound[key] = getattr(settings, key)
    folder = open_run_folder(settings.output_dir, bound, ("results.json", "report.html"))
    todo = [sequence for sequence in sequences if not _finished(folder, sequence)]
    with tqdm(total=sum(len(s.frames) - 1 for s in todo), unit="frame") as progress:
        for sequence in todo:
            progress.set_description(sequence.name)
            _run_sequence(vit, sequence, settings, device, folder, progress.update, statistics)
    for sequence in tqdm(sequences, desc="pictures", unit="sequence"):
        _draw(folder, sequence, settings)
    collected = collect_sequences([_score_path(folder, sequence) for sequence in sequences])
    results = {
        "task": "video segmentation",
        "checkpoint": network.record,
        "settings": bound,
        "split": settings.split,
        "computed_sequences": [sequence.name for sequence in todo],
        **collected,
        "versions": versions(),
    }
    table = object_table(collected["sequences"])
    write_file(folder / "per_sequence.csv", table)
    write_json(folder / "results.json", results)
    architecture = network.shape.name if network.shape is not None else None
    sheets = {sequence.name: _sheet_path(folder, sequence) for sequence in sequences}
    page = video_page(results, network.label, architecture, sheets)
    write_file(folder / "report.html", page)
    return results
