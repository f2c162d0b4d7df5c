"""``auto_umap``: UMAP pictures (McInnes et al., arXiv 1802.03426) of the validation images while training."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

__all__ = ["AutoUMAP", "check_umap", "umap_callbacks"]

_NEIGHBORS = 15  # umap-learn's own
_FEWEST = 3


def check_umap(cfg: DictConfig) -> None:
    """Make sure that ``auto_umap.enabled=True`` can be served.

    Raises:
        ValueError: if there are no labeled validation images to draw.
        ImportError: if umap-learn is not installed.
    """
    if not OmegaConf.select(cfg, "auto_umap.enabled"):
        return
    no_labels = OmegaConf.select(cfg, "data.no_labels", default=False)
    if OmegaConf.select(cfg, "data.val_path") is None or no_labels:
        raise ValueError(
            "auto_umap.enabled=True draws labeled validation images: set data.val_path, with "
            "data.no_labels=False, or auto_umap.enabled=False"
        )
    if importlib.util.find_spec("umap") is None:
        raise ImportError(
            "auto_umap.enabled=True needs umap-learn, which is not installed: pip install umap-learn, or set "
            "auto_umap.enabled=False"
        )


def umap_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callback that a parsed config with ``checkpoint.folder`` asks for, or none."""
    keys = cfg.get("auto_umap") or {}
    if not keys.get("enabled"):
        return []
    folder = Path(keys.get("dir", "auto_umap")) / cfg.method / Path(cfg.checkpoint.folder).name
    return [AutoUMAP(folder, cfg.name, frequency=keys.get("frequency", 1), seed=cfg.seed)]


class AutoUMAP(Callback):
    """Draws the student's features of all validation images after every ``frequency``-th epoch.

    The picture is ``<folder>/<name>-ep=<epoch>.pdf``; with wandb it is logged as ``validation_umap``, too.

    Args:
        folder: where the pictures go; it is made.
        name: how their names begin.
        frequency: epochs between two.
        seed: of UMAP: the same features give the same picture.

    Differs from upstream: the folder is the run's identity, not the logger's version; UMAP has a seed, and
    no random number of the run is drawn for a picture. (UMAP's compiled code may still change how the process
    rounds: with pictures, weights agree to about 1e-4 with those without.)
    """

    def __init__(self, folder: Path, name: str, *, frequency: int = 1, seed: int = 0) -> None:
        self.folder = folder
        self.name = name
        self.frequency = frequency
        self.seed = seed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect features on all ranks, draw on the first."""
        epoch = trainer.current_epoch
        if trainer.sanity_checking or epoch % self.frequency:
            return
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number when it starts
            features, labels = _features(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if len(features) < _FEWEST or not np.isfinite(features).all():
            warnings.warn(
                f"auto_umap: no picture of epoch {epoch}: {len(features)} images, of which "
                f"{int(np.isfinite(features).all(axis=1).sum())} have finite features",
                stacklevel=2,
            )
            return
        figure = _draw(_embed(features, self.seed), labels)
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{self.name}-ep={epoch}.pdf")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("validation_umap", [figure])


@torch.no_grad()
def _features(trainer: Trainer, module: LightningModule) -> tuple[npt.NDArray[Any], Any]:
    """``(N, D)`` float32 features and ``(N,)`` labels of the validation images of all ranks."""
    precision = trainer.precision_plugin
    loader: Any = trainer.val_dataloaders
    batches = trainer.num_val_batches
    limit = batches[0] if isinstance(batches, list) else batches
    parts: list[tuple[Any, Any]] = []
    for number, (images, labels) in enumerate(loader):
        if number >= limit:
            break
        with precision.forward_context():
            features = module(precision.convert_input(images.to(module.device)))["feats"]
        parts.append((features.float().cpu().numpy(), labels.cpu().numpy()))
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(gathered, parts)
        parts = [part for share in gathered for part in share]
    return np.concatenate([f for f, _ in parts]), np.concatenate([y for _, y in parts])


def _embed(features: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    """``(N, D)`` -> ``(N, 2)``."""
    import umap

    count = len(features)
    reducer = umap.UMAP(
        n_components=2,
        n_neighbors=min(_NEIGHBORS, count - 1),
        # the spectral start wants more images than neighbors
        init="spectral" if count > _NEIGHBORS + 1 else "random",
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(reducer.fit_transform(features))


def _draw(points: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Any:
    """A scatter plot, one color and one entry of the legend per class."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots()
    classes = np.unique(labels)
    for number, label in enumerate(classes):
        x, y = points[labels == label].T
        color = mpl.colormaps["hsv"](number / len(classes))
        axes.scatter(x, y, s=12, alpha=0.3, color=color, label=str(label))
    axes.set(xticks=[], yticks=[])
    columns = min(10, len(classes))
    figure.legend(
        loc="outside upper center", ncols=columns, fontsize=8 if len(classes) < 101 else 3
    )
    return figure
