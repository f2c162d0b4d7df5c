"""Images in memory, a folder or a loader, to features and what the mixture says about them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dinovmf_plugin.embeddings.pictures import Images, batches_of
from dinovmf_plugin.embeddings.scores import Embedder, Scored
from dinovmf_plugin.mixture.model import ImageScores, VMFMixture, typicality

__all__ = ["EmbeddedImages", "embed_images"]


@dataclass(frozen=True)
class EmbeddedImages:
    """What a network says about images; tensors are on the CPU, one row per image.

    Attributes:
        names: the files, or ``image 0`` .. of what is none.
        features: of the backbone ``(N, D)``, float32.
        embeddings: unit vectors of the head ``(N, p)``, float32; None without a mixture.
        scores: what the mixture says, column by column; None without one.
        mixture: the mixture itself; None without one.

    Example:
        >>> images = EmbeddedImages(("a.png",), torch.zeros(1, 4), None, None, None)
        >>> len(images)
        1
        >>> images.log_likelihood
        Traceback (most recent call last):
        ValueError: these images were embedded with mixture=False: there is no mixture to ask
    """

    names: tuple[str, ...]
    features: Tensor
    embeddings: Tensor | None
    scores: ImageScores | None
    mixture: VMFMixture | None

    def __len__(self) -> int:
        return len(self.names)

    def _asked(self) -> tuple[Tensor, ImageScores, VMFMixture]:
        if self.embeddings is None or self.scores is None or self.mixture is None:
            raise ValueError(
                "these images were embedded with mixture=False: there is no mixture to ask"
            )
        return self.embeddings, self.scores, self.mixture

    @property
    def component(self) -> Tensor:
        """Most responsible component of each image ``(N,)``, int64."""
        return self._asked()[1].component

    @property
    def responsibility(self) -> Tensor:
        """Its probability ``(N,)``, float32."""
        return self._asked()[1].responsibility

    @property
    def log_likelihood(self) -> Tensor:
        """``log p(y)`` under the mixture ``(N,)``, float64: the higher, the more typical the image."""
        return self._asked()[1].log_likelihood

    def responsibilities(self) -> Tensor:
        """Probabilities of all components (Eq. 2), ``(N, K)``, float32; made when asked for."""
        embeddings, _, mixture = self._asked()
        return mixture.responsibilities(embeddings.to(mixture.directions.device)).cpu()

    def typicality(self, reference: EmbeddedImages | None = None) -> Tensor:
        """Share of the reference's images that are at most as likely, ``(N,)``, float64: 0 is an outlier.

        Args:
            reference: what is typical, such as the images of training; by default these images.
        """
        return typicality(self.log_likelihood, (reference or self).log_likelihood)


def _joined(parts: list[Scored]) -> tuple[Tensor | None, ImageScores | None]:
    ys = [part.y for part in parts if part.y is not None]
    scores = [part.scores for part in parts if part.scores is not None]
    if not ys:
        return None, None
    columns = {
        field.name: torch.cat([getattr(part, field.name) for part in scores])
        for field in fields(ImageScores)
    }
    return torch.cat(ys), ImageScores(**columns)


def embed_images(
    embedder: Embedder,
    images: Images,
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    progress: bool = False,
) -> EmbeddedImages:
    """Features and scores of images; see ``pictures.batches_of`` for what may hold them.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the images are of no known kind, there is none, or a feature is not finite.
    """
    batches = batches_of(images, embedder.transform, batch_size=batch_size, num_workers=num_workers)
    parts: list[Scored] = []
    names: list[str] = []
    with tqdm(total=batches.total, desc="embedding", unit="img", disable=not progress) as bar:
        for pixels in batches.pixels:
            own = [batches.names(len(names) + row) for row in range(len(pixels))]
            parts.append(embedder.score(pixels, own.__getitem__))
            names += own
            bar.update(len(own))
    if not parts:
        raise ValueError("images holds no image")
    y, scores = _joined(parts)
    features = torch.cat([part.features for part in parts])
    return EmbeddedImages(tuple(names), features, y, scores, embedder.mixture)
