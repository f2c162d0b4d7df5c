"""The two verbs: import foreign weights, export trained ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dinovmf_plugin.checkpoints import graphs
from dinovmf_plugin.checkpoints.card import UNKNOWN_LICENSE, Measured, model_card
from dinovmf_plugin.checkpoints.heads import HeadSettings, head_from, with_head
from dinovmf_plugin.checkpoints.layouts import StoredWeights, Which, read_weights
from dinovmf_plugin.checkpoints.loading import network_from
from dinovmf_plugin.checkpoints.mixture import mixture_tensors
from dinovmf_plugin.checkpoints.named import NamedShape
from dinovmf_plugin.checkpoints.report import LoadReport
from dinovmf_plugin.checkpoints.writing import (
    check_free,
    inside,
    timm_config,
    write_safetensors,
)
from dinovmf_plugin.runs.files import write_file

__all__ = ["IMPORT_SOURCES", "export_weights", "import_weights"]

IMPORT_SOURCES = ("dino", "dinov2", "ibot", "msn", "solo")

# the layouts that each project publishes; backbone-only files of the first three look alike
_ACCEPTED = {
    "dino": ("dino", "timm"),
    "dinov2": ("dinov2", "timm"),
    "ibot": ("ibot", "timm"),
    "msn": ("msn", "timm"),
    "solo": ("solo", "dinovmf_plugin"),
}
_OF_HEAD = ["model.head.safetensors", "model.mixture.safetensors"]
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def _without_doubles(head: Mapping[str, Tensor], settings: HeadSettings) -> dict[str, Tensor]:
    """Tensors of a head, with iBOT's patch prototypes only where they are others."""
    keep_patch = settings.patch_prototypes == "separate"
    return {k: v for k, v in head.items() if keep_patch or not k.startswith("last_layer2.")}


def _check_config(path: Path) -> None:
    """Never replace a ``config.json`` that belongs to something else, not even with --overwrite."""
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        content = None
    if not isinstance(content, Mapping) or "architecture" not in content:
        raise FileExistsError(
            f"{path} exists and is no model configuration: choose an output in a folder of its own"
        )


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def import_weights(
    path: str | Path,
    output: str | Path,
    *,
    source: str,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: int | None = None,
    overwrite: bool = False,
) -> tuple[LoadReport, list[Path]]:
    """Convert a foreign checkpoint to timm-named safetensors.

    Writes ``output``, ``config.json`` beside it and, if the file has a projection head,
    ``NAME.head.safetensors``. ``load_backbone(output)`` and ``load_head(output)`` read them.

    Args:
        path: official or solo-learn checkpoint.
        output: name of the new file; must end in ``.safetensors``.
        source: ``dino``, ``dinov2``, ``ibot``, ``msn`` or ``solo``, checked against what is found.
        which: ``teacher`` or ``student``.
        model_name: see ``load_backbone``.
        num_heads: see ``load_backbone``.
        img_size: resample the position embeddings for images of this side in pixels.
        overwrite: replace existing files.

    Returns:
        The report and the files that were written.

    Raises:
        FileExistsError: if an output exists and ``overwrite`` is false.
        FileNotFoundError: if there is no file ``path``.
        ValueError: see ``load_backbone``; or another layout than ``source`` was found.
    """
    output = Path(output)
    if source not in IMPORT_SOURCES:
        raise ValueError(f"--source {source} is unknown: choose one of {', '.join(IMPORT_SOURCES)}")
    if output.suffix != ".safetensors" or output.name.endswith(".head.safetensors"):
        raise ValueError(f"--output {output} must be a file name that ends in .safetensors")
    config_path = output.parent / "config.json"
    head_path = output.with_suffix(".head.safetensors")
    check_free([output, config_path, head_path], overwrite)
    _check_config(config_path)
    stored = read_weights(path, which)
    if stored.source not in _ACCEPTED[source]:
        found = "a bare ViT state dict" if stored.source == "timm" else f"{stored.source} layout"
        raise ValueError(f"{path} is no {source} checkpoint: it has {found}; see --source")
    model, report, shape = network_from(
        stored, model_name=model_name, num_heads=num_heads, img_size=img_size
    )
    complete = with_head(stored)
    settings = head_from(complete)[1] if complete.head else None
    config = timm_config(shape, stored, settings)
    write_safetensors(output, model.state_dict(), config)
    write_file(config_path, _json(config))
    written = [output, config_path]
    if settings is not None:
        write_safetensors(head_path, _without_doubles(complete.head, settings), config)
        written.append(head_path)
    return report, written


def export_weights(
    path: str | Path,
    folder: str | Path,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: int | None = None,
    with_projection_head: bool | None = None,
    torchscript: bool = False,
    onnx: bool = False,
    overwrite: bool = False,
    license_name: str = UNKNOWN_LICENSE,
    measure: Callable[[StoredWeights], Sequence[Measured]] | None = None,
) -> tuple[LoadReport, list[Path]]:
    """Write a backbone as timm and the Hugging Face Hub expect it.

    ``folder`` receives ``model.safetensors``, ``config.json`` and the model card ``README.md``; of a file
    with a head ``model.head.safetensors`` and ``model.mixture.safetensors``, see ``mixture_tensors``; on
    demand ``model.torchscript.pt`` and ``model.onnx``, only after their outputs were compared with the
    network's.

    Args:
        path: a training checkpoint, or any file that ``load_backbone`` reads.
        folder: output folder, made if needed.
        which: ``teacher`` or ``student``.
        model_name: see ``load_backbone``.
        num_heads: see ``load_backbone``.
        img_size: resample the position embeddings for images of this side in pixels.
        with_projection_head: write the head and its mixture, which the file must have then; None writes
            them where it has them.
        torchscript: also trace the network.
        onnx: also write ONNX with a free batch size; needs onnx, onnxscript and onnxruntime.
        overwrite: replace existing files.
        license_name: the Hub's identifier of the weights' license, for the card.
        measure: what gives the scores of these very weights, for the card.

    Returns:
        The report and the files that were written.

    Raises:
        FileExistsError: if an output exists and ``overwrite`` is false.
        ImportError: if ``onnx`` is asked for and its packages are absent.
        ValueError: see ``load_backbone`` and ``load_head``; or a graph does not give the network's
            outputs, in which case the weights are not written either.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder} is a file, but a folder is needed")
    if not _LICENSE.fullmatch(license_name):
        raise ValueError(
            f"--license {license_name} is no identifier of the Hub: small letters, digits, dots and dashes, "
            "such as mit or cc-by-nc-4.0"
        )
    names = ["model.safetensors", "config.json", "README.md"]
    names += _OF_HEAD if with_projection_head is not False else []
    names += ["model.torchscript.pt"] if torchscript else []
    names += ["model.onnx"] if onnx else []
    targets = {name: inside(folder, name) for name in names}
    check_free(targets.values(), overwrite)
    _check_config(targets["config.json"])
    if onnx:
        graphs.require_onnx()
    stored = read_weights(path, which)
    model, report, shape = network_from(
        stored, model_name=model_name, num_heads=num_heads, img_size=img_size
    )
    if isinstance(shape, NamedShape) and shape.cifar:
        raise ValueError(
            f"{stored.path} holds {shape.name}, which no name of timm builds: it cannot be exported, only "
            "evaluated and analyzed here"
        )
    images = (shape.in_chans, *shape.img_size)
    complete = with_head(stored)
    headed = with_projection_head or (with_projection_head is None and bool(complete.head))
    for name in _OF_HEAD if not headed else []:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} belongs to another export and would be taken for this network's: move it "
                "away, or choose another output"
            )
    mixture, settings = mixture_tensors(complete) if headed else (None, None)
    config = timm_config(shape, stored, settings)
    measured = () if measure is None else measure(stored)
    if torchscript:
        graphs.write_torchscript(model, images, targets["model.torchscript.pt"])
    if onnx:
        graphs.write_onnx(model, images, targets["model.onnx"])
    write_safetensors(targets["model.safetensors"], model.state_dict(), config)
    write_file(targets["config.json"], _json(config))
    card = model_card(shape, config, mixture=mixture, measured=measured, license_name=license_name)
    write_file(targets["README.md"], card)
    if mixture is None or settings is None:
        return report, [path for name, path in targets.items() if name not in _OF_HEAD]
    head, beside = (targets[name] for name in _OF_HEAD)
    write_safetensors(head, _without_doubles(complete.head, settings), config)
    write_safetensors(beside, mixture, config)
    return report, list(targets.values())
