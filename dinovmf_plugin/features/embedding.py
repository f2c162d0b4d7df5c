"""The unit vectors that a network's head makes of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.extraction import extract_feature_set, resolve_feature
from dinovmf_plugin.features.images import ImageSet, loader_for
from dinovmf_plugin.features.network import Network

__all__ = ["Embeddings", "assign", "embed"]

_ROWS = 256


@dataclass(frozen=True)
class Embeddings:
    """What a network makes of a set of images, on the CPU, in the set's order.

    Attributes:
        y: unit vectors of the head ``(N, p)``, float32.
        features: CLS after the final norm, or the pooled output, ``(N, D)``, float32.
    """

    y: Tensor
    features: Tensor


@torch.no_grad()
def embed(
    network: Network,
    images: ImageSet,
    transform: CenterCrop,
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    progress: bool = True,
) -> Embeddings:
    """Run backbone and head over all images.

    Args:
        network: with its head, see ``load_network``; where it is, it runs.
        images: the set.
        transform: resize and crop; its statistics are replaced by the network's own.
        batch_size: images per batch.
        num_workers: worker processes.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if an image cannot be read or an embedding is not finite; the file is named.
    """
    head, _ = network.mixture_head
    device = network.prototypes.weight_v.device
    loader = loader_for(
        images, network.normalized(transform), batch_size=batch_size, num_workers=num_workers
    )
    found, _ = extract_feature_set(
        network.model,
        loader,
        {"cls": resolve_feature("cls", network.model)},
        device,
        progress=progress,
        name=images.name,
        total=len(images),
    )
    ys: list[Tensor] = []
    for start, rows in enumerate(found["cls"].split(batch_size)):
        y = head(rows.to(device))
        bad = ~y.isfinite().all(dim=1)
        if bool(bad.any()):
            index = start * batch_size + int(bad.nonzero()[0])
            raise ValueError(
                f"{network.record['checkpoint']}: the embedding of {images.describe_image(index)} is NaN or "
                "infinite"
            )
        ys.append(y.float().cpu())
    return Embeddings(torch.cat(ys), found["cls"])


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
