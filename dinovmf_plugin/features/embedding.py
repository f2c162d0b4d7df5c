"""The unit vectors that a network's head makes of images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.checks import NonFiniteFeaturesError, first_non_finite_row
from dinovmf_plugin.features.extraction import FeatureSpec, backbone_features, resolve_feature
from dinovmf_plugin.features.images import ImageSet, loader_for
from dinovmf_plugin.features.network import Network

__all__ = ["Embeddings", "assign", "embed", "embed_batch"]

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
def embed_batch(
    network: Network,
    pixels: Tensor,
    feature: FeatureSpec | None,
    *,
    precision: torch.dtype = torch.float32,
    name_of: Callable[[int], str] = "image {}".format,
) -> tuple[Tensor, Tensor | None]:
    """Run backbone and head, if there is one, over a batch.

    Args:
        network: where it is, it runs.
        pixels: normalized images ``(B, 3, H, W)``.
        feature: which feature to return, see ``resolve_feature``; the head has its own, the CLS token.
        precision: of the backbone's pass; the head's is float32.
        name_of: the name of an image of the batch, for messages.

    Returns:
        Features ``(B, D)`` and the head's unit vectors ``(B, p)`` (None without a head), float32, on the
        network's device.

    Raises:
        ValueError: if a feature or an embedding is not finite; the image is named.
    """
    device = network.device
    wanted = [feature]
    if network.head is not None:
        of_head = resolve_feature("cls", network.model)
        wanted += [of_head] if of_head != feature else []
    half = precision != torch.float32
    with torch.autocast(device.type, precision) if half else nullcontext():
        found = backbone_features(network.model, pixels.to(device, non_blocking=True), wanted)
    bad = first_non_finite_row(found[0])
    if bad is not None:
        raise NonFiniteFeaturesError(
            f"{network.record['checkpoint']}: the feature of {name_of(bad)} is NaN or infinite"
        )
    if network.head is None:
        return found[0], None
    y = network.head(found[-1]).float()
    bad = first_non_finite_row(y)
    if bad is not None:
        raise ValueError(
            f"{network.record['checkpoint']}: the embedding of {name_of(bad)} is NaN or infinite"
        )
    return found[0], y


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
    network.mixture_head  # noqa: B018 (raises without a head)
    feature = resolve_feature("cls", network.model)
    loader = loader_for(
        images, network.normalized(transform), batch_size=batch_size, num_workers=num_workers
    )
    features: list[Tensor] = []
    ys: list[Tensor] = []
    done = 0
    with tqdm(
        total=len(images), desc=f"features of {images.name}", unit="img", disable=not progress
    ) as bar:
        for pixels, _ in loader:
            found, y = embed_batch(
                network,
                pixels,
                feature,
                name_of=lambda index, done=done: images.describe_image(done + index),  # type: ignore[misc]
            )
            assert y is not None
            features.append(found.cpu())
            ys.append(y.cpu())
            done += len(pixels)
            bar.update(len(pixels))
    return Embeddings(torch.cat(ys), torch.cat(features))


@torch.no_grad()
def assign(prototypes: Prototypes, y: Tensor, temperature: float) -> Tensor:
    """Prototype of highest logit of each row, under the layer's own formulation and without center.

    Args:
        prototypes: the layer; ``vmf`` includes the log-normalizer.
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
