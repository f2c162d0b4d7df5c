"""A network with its mixture, applied to batches of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.embeddings.settings import EmbedderSettings
from dinovmf_plugin.features.embedding import embed_batch
from dinovmf_plugin.features.extraction import FeatureSpec, resolve_feature
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import Network, load_source
from dinovmf_plugin.features.settings import PRECISIONS, CropSettings
from dinovmf_plugin.mixture.model import ImageScores, VMFMixture
from dinovmf_plugin.runs.environment import pick_device

__all__ = ["Embedder", "Scored"]


@dataclass(frozen=True)
class Scored:
    """A batch.

    Attributes:
        features: ``(B, D)``, float32, on the CPU.
        y: unit vectors of the head ``(B, p)``, float32, on the CPU; None without a mixture.
        scores: what the mixture says; None without one.
    """

    features: Tensor
    y: Tensor | None
    scores: ImageScores | None


@dataclass(frozen=True)
class Embedder:
    """What makes features and scores of images.

    Attributes:
        network: backbone and, with a mixture, head.
        transform: from a picture to its pixels.
        feature: which feature.
        precision: of the backbone's pass.
        mixture: of the head's prototypes, or None.
    """

    network: Network
    transform: CenterCrop
    feature: FeatureSpec | None
    precision: torch.dtype
    mixture: VMFMixture | None

    @classmethod
    def load(cls, settings: EmbedderSettings, crop: CropSettings) -> Embedder:
        """Read the network and put it on its device.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file, the feature or the device cannot be used, or there is no head.
        """
        device = pick_device(settings.device)
        network = load_source(settings, head=settings.mixture).to(device)
        return cls(
            network,
            network.normalized(crop.transform(network.image_size)),
            resolve_feature(settings.feature, network.model),
            PRECISIONS[settings.precision],
            make_mixture(network, settings.weights) if settings.mixture else None,
        )

    @torch.no_grad()
    def score(self, pixels: Tensor, name_of: Callable[[int], str]) -> Scored:
        """Features and scores of normalized images ``(B, 3, H, W)``.

        Raises:
            ValueError: if a feature or an embedding is not finite; ``name_of(row)`` is named.
        """
        features, y = embed_batch(
            self.network, pixels, self.feature, precision=self.precision, name_of=name_of
        )
        if self.mixture is None or y is None:
            return Scored(features.cpu(), None, None)
        return Scored(features.cpu(), y.cpu(), self.mixture.score(y))
