"""The two verbs: import foreign weights, export trained ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinovmf_plugin.checkpoints import graphs
from dinovmf_plugin.checkpoints.card import model_card
from dinovmf_plugin.checkpoints.heads import HeadSettings, head_from, with_head
from dinovmf_plugin.checkpoints.layouts import StoredWeights, Which, read_weights
from dinovmf_plugin.checkpoints.loading import network_from
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


def _head(stored: StoredWeights) -> tuple[dict[str, Tensor], HeadSettings]:
    """Tensors of a valid head, with iBOT's patch prototypes only where they are others."""
    _, settings = head_from(stored)
    keep_patch = settings.patch_prototypes == "separate"
    return {
        name: value
        for name, value in stored.head.items()
        if keep_patch or not name.startswith("last_layer2.")
    }, settings


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
    head = _head(complete) if complete.head else None
    config = timm_config(shape, stored, head[1] if head else None)
    write_safetensors(output, model.state_dict(), config)
    write_file(config_path, _json(config))
    written = [output, config_path]
    if head is not None:
        write_safetensors(head_path, head[0], config)
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
    with_projection_head: bool = False,
    torchscript: bool = False,
    onnx: bool = False,
    overwrite: bool = False,
) -> tuple[LoadReport, list[Path]]:
    """Write a backbone as timm and the Hugging Face Hub expect it.

    ``folder`` receives ``model.safetensors``, ``config.json`` and the model card ``README.md``; on
    demand ``model.head.safetensors``, ``model.torchscript.pt`` and ``model.onnx``, the last two only
    after their outputs were compared with the network's.

    Args:
        path: a training checkpoint, or any file that ``load_backbone`` reads.
        folder: output folder, made if needed.
        which: ``teacher`` or ``student``.
        model_name: see ``load_backbone``.
        num_heads: see ``load_backbone``.
        img_size: resample the position embeddings for images of this side in pixels.
        with_projection_head: also write the head with its prototypes and settings.
        torchscript: also trace the network.
        onnx: also write ONNX with a free batch size; needs onnx, onnxscript and onnxruntime.
        overwrite: replace existing files.

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
    names = ["model.safetensors", "config.json", "README.md"]
    names += ["model.head.safetensors"] if with_projection_head else []
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
            "evaluated and analysed here"
        )
    images = (shape.in_chans, *shape.img_size)
    head = _head(with_head(stored)) if with_projection_head else None
    config = timm_config(shape, stored, head[1] if head else None)
    if torchscript:
        graphs.write_torchscript(model, images, targets["model.torchscript.pt"])
    if onnx:
        graphs.write_onnx(model, images, targets["model.onnx"])
    write_safetensors(targets["model.safetensors"], model.state_dict(), config)
    write_file(targets["config.json"], _json(config))
    card = model_card(shape, config)
    write_file(targets["README.md"], card)
    if head is not None:
        write_safetensors(targets["model.head.safetensors"], head[0], config)
    return report, list(targets.values())
