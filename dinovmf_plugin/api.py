"""The functions of ``import dinovmf_plugin as dv``: pre-train, embed, evaluate, look inside.

Keys are those of the commands (docs/keys.md). A key at the top is a keyword (``max_epochs=10``); one within a
group is dotted, in ``settings`` (``settings={"optimizer.lr": 1e-3}``). What nobody reads is refused with the
nearest right name, as on the command line.

A whole story, on eight pictures of noise (numbers small enough for a CPU and a moment):

>>> import tempfile, warnings
>>> import numpy as np
>>> from pathlib import Path
>>> from PIL import Image
>>> import dinovmf_plugin as dv
>>> warnings.simplefilter("ignore")  # too few pictures to learn from, as the monitor tells
>>> work, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
>>> for name in ("a", "b"):
...     (work / "photos" / name).mkdir(parents=True)
...     for number in range(4):
...         noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
...         Image.fromarray(noise).save(work / "photos" / name / f"{number}.png")
>>> small = {"optimizer.batch_size": 4, "scheduler.warmup_epochs": 0, "method_kwargs.num_prototypes": 32}
>>> small |= {"method_kwargs.proj_hidden_dim": 16, "method_kwargs.proj_output_dim": 8}
>>> small |= {"data.format": "image_folder", "data.num_workers": 0}
>>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
>>> run = dv.pretrain(
...     "demo_recipe", work / "photos", output_dir=work / "runs", max_epochs=1, settings=small, **quiet
... )
>>> run.checkpoint.name, len(run.curves["train_loss_epoch"][1])
('demo-ep0.ckpt', 1)
>>> found = dv.embed(run, work / "photos")
>>> found.features.shape, found.component.shape, found.responsibilities().shape
(torch.Size([8, 128]), torch.Size([8]), torch.Size([8, 32]))
>>> float(found.typicality().max())  # one is the most likely of all
1.0
>>> found = dv.knn_accuracy(run, work / "photos", work / "photos", ks=[1], settings={"knn.crop_size": 32})
>>> found[1][0]  # every picture is its own nearest neighbor
100.0
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinovmf_plugin.analysis.run import analyze as _analyze
from dinovmf_plugin.analysis.settings import AnalysisSettings
from dinovmf_plugin.data.folders import class_names
from dinovmf_plugin.embeddings.memory import EmbeddedImages, embed_images
from dinovmf_plugin.embeddings.pictures import Images
from dinovmf_plugin.embeddings.scores import Embedder
from dinovmf_plugin.embeddings.settings import EmbedderSettings
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.features.knn import DEFAULT_KS
from dinovmf_plugin.features.settings import CropSettings
from dinovmf_plugin.pretraining import pretrain as _pretrain
from dinovmf_plugin.recipes import PARTS, compose_anywhere
from dinovmf_plugin.runs.settings import plain, read
from dinovmf_plugin.training.trained_run import Run

__all__ = ["EmbeddedImages", "Run", "analyze", "embed", "knn_accuracy", "pretrain"]

PathLike = str | os.PathLike[str]


def _update(cfg: Any, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        try:
            OmegaConf.update(cfg, key, plain(value), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"{key}={value!r} cannot be set: {reason}") from error


def _nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as groups."""
    cfg = OmegaConf.create({})
    _update(cfg, keys)
    found: Any = OmegaConf.to_container(cfg, resolve=True)
    return found  # type: ignore[no-any-return]


def pretrain(
    recipe: str,
    data: PathLike | None = None,
    *,
    val_data: PathLike | None = None,
    output_dir: PathLike | None = None,
    resume: bool | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    **keys: Any,
) -> Run:
    """Train as ``dinovmf pretrain --config-name RECIPE`` does.

    With ``devices`` above 1 Lightning starts the calling script once more for every further device: keep the
    call under ``if __name__ == "__main__"``.

    Args:
        recipe: by name, such as ``custom/dino_vmf``; ``dinovmf recipes`` lists them.
        data: ``data.train_path``, a folder of images. One without sub-folders has no labels:
            ``data.no_labels`` is True then, unless it is given.
        val_data: ``data.val_path``, held-out images of the same classes.
        output_dir: ``checkpoint.dir``; the run has a folder of its own there.
        resume: ``auto_resume.enabled``: whether to go on with the same run where it was stopped.
        settings: any key of the recipe, dotted: ``{"optimizer.lr": 1e-3}``. A group may be a mapping,
            which is merged: ``{"optimizer": {"lr": 1e-3}}``.
        callbacks: further Lightning callbacks.
        **keys: keys at the top: ``max_epochs``, ``seed``, ``precision``, ``devices`` .. ``method``,
            ``backbone``, ``augmentations``, ``optimization`` and ``trainer`` choose a part of the recipe by
            its name, as on the command line: ``method="ibot_vmf"``.

    Returns:
        The finished run: checkpoint, folder, recipe, curves.

    Raises:
        ValueError, FileNotFoundError: for anything wrong in the recipe, the keys or the data, in one
            sentence, before training.
        OSError: if a checkpoint cannot be written; the one before it stays.

    Example:
        >>> pretrain("custom/dino_vmf", "photos/", max_epoch=10)
        Traceback (most recent call last):
        ValueError: max_epoch is no key of a recipe: did you mean max_epochs?
    """
    named = {
        "data.train_path": data,
        "data.val_path": val_data,
        "checkpoint.dir": output_dir,
        "auto_resume.enabled": resume,
    }
    chosen = [
        f"{key}={value}" for key, value in keys.items() if key in PARTS and isinstance(value, str)
    ]
    cfg = compose_anywhere(recipe, chosen)
    OmegaConf.set_struct(cfg, False)
    _update(cfg, {key: value for key, value in named.items() if value is not None})
    if data is not None and Path(data).is_dir() and not class_names(data):
        _update(cfg, {"data.no_labels": True})
    _update(cfg, {key: v for key, v in keys.items() if f"{key}={v}" not in chosen})
    _update(cfg, {"checkpoint.enabled": True, **(settings or {})})
    if cfg.checkpoint.enabled is False:
        raise ValueError("checkpoint.enabled=False leaves no run to return: leave it out")
    checkpoint = _pretrain(cfg, callbacks)
    assert checkpoint is not None
    return Run(checkpoint)


def embed(
    checkpoint: PathLike,
    images: Images,
    *,
    which: Literal["teacher", "student"] = "teacher",
    feature: str | Mapping[str, Any] = "cls",
    mixture: bool = True,
    weights: Literal["model", "uniform", "center"] = "model",
    crop_size: int | None = None,
    resize: int | None = None,
    interpolation: str = "bicubic",
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int = 4,
    device: str = "auto",
    progress: bool = False,
    weight_file: PathLike | None = None,
    model_name: str | None = None,
    num_heads: int | None = None,
) -> EmbeddedImages:
    """Features of images, and what the mixture of prototypes says about each.

    ``dinovmf embed`` does the same for a folder of any size, onto the disk.

    Args:
        checkpoint: a ``Run``, or whatever ``dinovmf embed`` takes: a training checkpoint, an official file,
            an exported folder; ``random:TIMM_NAME``, ``timm:TIMM_NAME`` or ``pixels`` with ``mixture=False``.
        images: a folder (all images at any depth) or a file; a PIL image; an array of uint8, ``(N, H, W, 3)``
            or ``(N, H, W)``; a list of files, PIL images and arrays. A float tensor ``(N, 3, H, W)`` and a
            DataLoader of such batches (alone, or before their labels) are taken as normalized pixels.
        which: of the two networks.
        feature: ``cls``, ``cls_pre_norm``, ``dino``, or a mapping of its parts.
        mixture: whether to apply the mixture, which needs a head.
        weights: mixture proportions: of the model's own softmax, uniform, or of the stored center.
        crop_size: side of the center crop; by default what the backbone was made for.
        resize: shorter side before the crop; by default ``crop_size * 256 / 224``.
        interpolation: ``bicubic`` or ``bilinear``.
        precision: of the backbone's pass: ``float32``, ``bfloat16`` or ``float16``.
        batch_size: images per pass.
        num_workers: processes that read images.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ..
        progress: whether to show a progress bar.
        weight_file: of ``timm:TIMM_NAME``; nothing is downloaded.
        model_name: ``vit_tiny`` .. ``vit_huge``, where the number of heads cannot be inferred.
        num_heads: attention heads, for other sizes.

    Returns:
        Features, unit vectors, components, responsibilities and log-likelihoods, row by row.

    Raises:
        FileNotFoundError: if a file or a folder is missing.
        ValueError: if the checkpoint, the images or a setting cannot be used.

    Example:
        >>> import numpy as np
        >>> pictures = np.zeros((2, 40, 30, 3), dtype=np.uint8)
        >>> embed("pixels", pictures, mixture=False, crop_size=32).features.shape
        torch.Size([2, 3072])
    """
    given = {
        "checkpoint": os.fspath(checkpoint),
        "which": which,
        "weight_file": weight_file,
        "model_name": model_name,
        "num_heads": num_heads,
        "mixture": mixture,
        "weights": weights,
        "feature": feature,
        "precision": precision,
        "device": device,
    }
    crop = {
        "crop_size": crop_size,
        "resize": resize,
        "interpolation": interpolation,
        "batch_size": batch_size,
        "num_workers": num_workers,
    }
    reading = read(CropSettings, crop)
    embedder = Embedder.load(read(EmbedderSettings, given), reading)
    return embed_images(
        embedder,
        images,
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
        progress=progress,
    )


def knn_accuracy(
    checkpoint: PathLike,
    data: PathLike,
    val_data: PathLike,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    output_dir: PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[int, tuple[float, float]]:
    """Weighted kNN accuracy of frozen features, as ``dinovmf knn`` measures it (DINO's protocol).

    Args:
        checkpoint: a ``Run``, or whatever ``dinovmf knn`` takes.
        data: ``data.train_path``, a folder with one sub-folder of images per class.
        val_data: ``data.val_path``, the same classes or some of them.
        ks: numbers of neighbors; more than there are training images are left out.
        output_dir: for ``knn.json``, the page and the features; by default nothing is kept.
        settings: any key of ``dinovmf knn``, dotted: ``{"knn.crop_size": 96}``.
        **keys: keys at the top: ``device``, ``precision``, ``seed`` ..

    Returns:
        Top-1 and top-5 accuracy in percent by number of neighbors.

    Raises:
        FileNotFoundError: if the checkpoint or a folder is missing.
        ValueError: if a key, the images or the network cannot be used.

    Example:
        >>> knn_accuracy("pixels", "train", "val", ks=[0])
        Traceback (most recent call last):
        ValueError: knn.ks=[0] must be a list of whole numbers of at least 1, one at least
    """
    given = {
        "checkpoint": os.fspath(checkpoint),
        "data.train_path": data,
        "data.val_path": val_data,
        "knn.ks": list(ks),
        "progress": False,
        **keys,
        **(settings or {}),
    }
    # the command's lines on the screen are what this function returns
    with tempfile.TemporaryDirectory() as passing, redirect_stdout(io.StringIO()):
        folder = passing if output_dir is None else os.fspath(output_dir)
        found = evaluate_one(_nested({"output_dir": folder, **given}), "knn")
    scores = {int(k[1:]): v for k, v in found.items() if k[:1] == "k" and k[1:].isdigit()}
    return {k: (value["top1"], value["top5"]) for k, value in scores.items()}


def analyze(
    checkpoint: PathLike,
    data: PathLike,
    output_dir: PathLike,
    *,
    val_data: PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Measure and picture a trained mixture, as ``dinovmf analyze`` does.

    Args:
        checkpoint: a ``Run``, or whatever ``dinovmf analyze`` takes, with its head.
        data: ``data.train_path``, one folder per class or a plain folder of images.
        output_dir: for analysis.json, the pages, tables and figures.
        val_data: ``data.val_path``, images of the same classes, for Figure 2.
        settings: any key of ``dinovmf analyze``, dotted: ``{"gallery.components": 8}``.
        **keys: keys at the top: ``name``, ``weights``, ``device`` ..

    Returns:
        What analysis.json holds.

    Raises:
        FileNotFoundError: if the checkpoint or a folder is missing.
        ValueError: if a key, the checkpoint or an image cannot be used.

    Example:
        >>> analyze("last.ckpt", "photos", "out", weight="uniform")
        Traceback (most recent call last):
        ValueError: weight is no known key: did you mean weights?
    """
    given = {
        "checkpoint": os.fspath(checkpoint),
        "data.train_path": data,
        "data.val_path": val_data,
        "output_dir": output_dir,
        **keys,
        **(settings or {}),
    }
    return _analyze(read(AnalysisSettings, _nested(given)))
