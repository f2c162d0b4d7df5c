"""Models and images of an analysis: what is read, and the unit vectors that images become."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dinovmf_plugin.checkpoints.heads import HeadSettings, head_from, with_head
from dinovmf_plugin.checkpoints.layouts import Which, read_weights
from dinovmf_plugin.checkpoints.loading import backbone_from
from dinovmf_plugin.checkpoints.reading import read_file, resolve_file
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vit import forward_tokens
from dinovmf_plugin.data.channels import Statistics, channel_statistics
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import ImageFolder, list_images, relabel, take_fraction
from dinovmf_plugin.data.loaders import FolderSource
from dinovmf_plugin.data.unreadable import find_unreadable

__all__ = ["Embeddings", "Images", "LoadedModel", "assign", "embed", "find_images", "load_model"]

_ROWS = 256


@dataclass(frozen=True)
class LoadedModel:
    """One network of a checkpoint with its prototypes.

    Attributes:
        path: the file.
        vit: backbone in eval mode.
        head: projection head in eval mode; ``head.last_layer`` holds the prototypes.
        settings: temperatures and switches.
        center: the stored centre ``(K,)``, None if the file has none.
        report: what was loaded, for people.
        statistics: what its images are normalised by.
    """

    path: Path
    vit: Any
    head: DINOHead
    settings: HeadSettings
    center: Tensor | None
    report: str
    statistics: Statistics

    @property
    def prototypes(self) -> Prototypes:
        """The prototype layer."""
        return self.head.last_layer

    @property
    def image_size(self) -> int:
        """Side of the images that the position embeddings were made for, in pixels."""
        return int(self.vit.patch_embed.img_size[0])

    def normalised(self, transform: CenterCrop) -> CenterCrop:
        """The transform with the channel statistics that the model was trained with."""
        return replace(transform, **self.statistics._asdict())


def _stored_center(path: Path) -> Tensor | None:
    """Centre of a plugin checkpoint, or of an official DINO or iBOT one (for CLS)."""
    content = read_file(resolve_file(path))
    for section, key in (
        ("state_dict", "centering.center"),
        ("dino_loss", "center"),
        ("ibot_loss", "center"),
    ):
        tensors = content.get(section)
        if isinstance(tensors, dict) and isinstance(tensors.get(key), Tensor):
            return tensors[key].float().reshape(-1)
    return None


def load_model(
    path: str | Path,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load backbone, head and centre; arguments and errors of ``checkpoints.load_backbone``."""
    stored = read_weights(path, which)
    vit, report, _ = backbone_from(stored, model_name=model_name, num_heads=num_heads)
    head, settings = head_from(with_head(stored))
    width = next(head.mlp.parameters()).shape[1]
    if width != vit.embed_dim:
        raise ValueError(
            f"{path}: the head takes {width} features, the backbone gives {vit.embed_dim}"
        )
    center = _stored_center(Path(path))
    if center is not None and len(center) != head.last_layer.num_prototypes:
        center = None
    return LoadedModel(
        path=Path(path),
        vit=vit.to(device),
        head=head.to(device),
        settings=settings,
        center=center,
        report=str(report),
        statistics=channel_statistics(stored.config),
    )


@dataclass(frozen=True)
class Images:
    """A named set of images.

    Attributes:
        name: for messages and tables, such as ``train``.
        folder: paths, labels (-1 without classes) and class names.
    """

    name: str
    folder: ImageFolder

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def labels(self) -> Tensor:
        """Labels ``(N,)``, int64."""
        return torch.from_numpy(self.folder.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty without labels."""
        return self.folder.classes

    def class_of(self, index: int) -> str:
        """Class name of an image, empty without labels."""
        return self.classes[int(self.folder.labels[index])] if self.classes else ""


def find_images(
    root: str | Path,
    key: str,
    *,
    classes: Sequence[str] = (),
    fraction: float | None = None,
    skip_unreadable: bool = False,
) -> Images:
    """List a folder's images, labelled by sub-folder where it has any, and check that they open.

    Args:
        root: one sub-folder per class, or a plain folder of images (labels -1, no classes).
        key: config key for the messages, such as ``data.train_path``.
        classes: class names of the training set, for a labelled validation set.
        fraction: share of the images to take, the same of every class; None or -1 for all.
        skip_unreadable: leave out images that cannot be read instead of refusing them.

    Returns:
        The images, named after the key.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no images, a class that the training set lacks, or unreadable images
            (named) that may not be skipped.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{key}={str(root)!r} is not a folder")
    labelled = any(
        entry.is_dir() and not entry.name.startswith(".") for entry in Path(root).iterdir()
    )
    folder = list_images(root, labelled=labelled, key=key)
    if classes and folder.classes:
        folder = relabel(folder, classes, key=key)
    folder = folder.subset(take_fraction(folder.labels, fraction))
    broken = find_unreadable([folder.path(i) for i in range(len(folder))])
    if broken and not skip_unreadable:
        first, problem = next(iter(broken.items()))
        raise ValueError(
            f"{key}: {len(broken)} of {len(folder)} images cannot be read, such as "
            f"{folder.path(first)} ({problem}): repair them or set data.skip_unreadable=true"
        )
    if len(broken) == len(folder):
        raise ValueError(f"{key}: none of the {len(folder)} images in {str(root)!r} can be read")
    if broken:
        warnings.warn(f"{key}: {len(broken)} unreadable images are left out", stacklevel=2)
        folder = folder.subset(np.setdiff1d(np.arange(len(folder)), list(broken)))
    return Images(key.rpartition(".")[2].removesuffix("_path"), folder)


@dataclass(frozen=True)
class Embeddings:
    """What a model makes of a set of images, on the CPU, in the set's order.

    Attributes:
        y: unit vectors of the head ``(N, p)``, float32.
        features: CLS after the final norm ``(N, D)``, float32.
    """

    y: Tensor
    features: Tensor


@torch.no_grad()
def embed(
    model: LoadedModel,
    images: Images,
    transform: CenterCrop,
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    progress: bool = True,
) -> Embeddings:
    """Run backbone and head over all images.

    Args:
        model: the network.
        images: the set.
        transform: resize and crop; its statistics are replaced by the model's own.
        batch_size: images per batch.
        num_workers: worker processes.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if an image cannot be read or an embedding is not finite; the file is named.
    """
    device = model.prototypes.weight_v.device
    loader = evaluation_loader(
        FolderSource(images.folder),
        transform=model.normalised(transform),
        batch_size=batch_size,
        num_workers=min(num_workers, len(images)),
    )
    ys, features, done = [], [], 0
    with tqdm(
        total=len(images), desc=f"embedding {images.name}", unit="img", disable=not progress
    ) as bar:
        for batch, _ in loader:
            cls = forward_tokens(model.vit, batch.to(device, non_blocking=True))[:, 0]
            y = model.head(cls)
            bad = ~y.isfinite().all(dim=1)
            if bool(bad.any()):
                name = images.folder.path(done + int(bad.nonzero()[0]))
                raise ValueError(f"{model.path}: the embedding of {name} is NaN or infinite")
            ys.append(y.float().cpu())
            features.append(cls.float().cpu())
            done += len(batch)
            bar.update(len(batch))
    return Embeddings(torch.cat(ys), torch.cat(features))


@torch.no_grad()
def assign(prototypes: Prototypes, y: Tensor, temperature: float) -> Tensor:
    """Prototype of highest logit of each row, under the layer's own formulation and without centre.

    Args:
        prototypes: the layer; ``vmf`` includes the log-normaliser.
        y: unit vectors ``(N, p)``.
        temperature: the teacher's ``tau``.

    Returns:
        int64 ``(N,)``, on the CPU.

    Example:
        >>> layer = Prototypes(4, 3)
        >>> bool((assign(layer, layer.directions(), 0.1) == torch.arange(3)).all())
        True
    """
    device = prototypes.weight_v.device
    return torch.cat(
        [prototypes(rows.to(device), temperature).argmax(dim=-1).cpu() for rows in y.split(_ROWS)]
    )
