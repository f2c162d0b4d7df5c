"""Features of a frozen backbone, as each of the paper's evaluations defines them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dinovmf_plugin.core.vit import has_tokens, intermediate_tokens
from dinovmf_plugin.features.checks import NonFiniteFeaturesError, first_non_finite_row

__all__ = [
    "FeatureSpec",
    "PixelFeatures",
    "backbone_features",
    "extract_feature_set",
    "extract_features",
    "resolve_feature",
]


@dataclass(frozen=True)
class FeatureSpec:
    """Which tokens of a ViT make the feature.

    Attributes:
        n_last_blocks: CLS tokens of this many last blocks are concatenated, oldest first.
        avgpool: append the mean patch token of the last block.
        final_norm: whether every token goes through the final LayerNorm.
    """

    n_last_blocks: int = 1
    avgpool: bool = False
    final_norm: bool = True

    def __str__(self) -> str:
        blocks = f"CLS of the last {self.n_last_blocks} blocks" if self.n_last_blocks > 1 else "CLS"
        pooled = " + mean patch token" if self.avgpool else ""
        return f"{blocks}{pooled}, {'after' if self.final_norm else 'before'} the final norm"


class PixelFeatures(nn.Module):
    """Baseline without a network: the image shrunk to ``size x size`` and flattened.

    Example:
        >>> PixelFeatures(4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 48])
    """

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to ``(B, 3 * size * size)``."""
        small = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return small.flatten(1)


def resolve_feature(
    feature: str | FeatureSpec | Mapping[str, Any], model: nn.Module
) -> FeatureSpec | None:
    """A feature by name for this model; None for a module whose output is the feature.

    Args:
        feature: ``cls`` (kNN, linear [C]), ``cls_pre_norm`` (few-shot, as MSN), ``dino`` (linear [D]: the
            CLS of the last 4 blocks, or from width 768 on the last CLS and the mean patch token), a
            ``FeatureSpec``, or its fields as a mapping.
        model: a timm ViT, or any module that maps images to ``(B, D)``.

    Raises:
        ValueError: for an unknown name or field, or more blocks than the model has.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        >>> print(resolve_feature("dino", vit))
        CLS of the last 4 blocks, after the final norm
    """
    if not has_tokens(model):
        return None
    width, depth = int(model.embed_dim), len(model.blocks)  # type: ignore[arg-type]
    named = {
        "cls": FeatureSpec(),
        "cls_pre_norm": FeatureSpec(final_norm=False),
        "dino": FeatureSpec(avgpool=True) if width >= 768 else FeatureSpec(min(4, depth)),
    }
    if isinstance(feature, FeatureSpec):
        spec = feature
    elif isinstance(feature, str) and feature in named:
        spec = named[feature]
    elif isinstance(feature, Mapping) and set(feature) <= set(FeatureSpec.__annotations__):
        spec = FeatureSpec(**feature)
    else:
        raise ValueError(
            f"feature={feature!r} is unknown: choose one of {list(named)}, or a mapping with "
            f"{list(FeatureSpec.__annotations__)}"
        )
    if not 1 <= spec.n_last_blocks <= depth:
        raise ValueError(
            f"feature={feature!r} needs {spec.n_last_blocks} blocks, but the backbone has {depth}"
        )
    return spec


def backbone_features(
    model: nn.Module, images: Tensor, specs: Sequence[FeatureSpec | None]
) -> list[Tensor]:
    """Several features from one forward pass, each ``(B, D_i)`` float32.

    A spec of None takes the module's own output.
    """
    blocks = max((spec.n_last_blocks for spec in specs if spec is not None), default=0)
    # the raw tokens once; LayerNorm acts per token, so only those that are used go through it
    tokens = intermediate_tokens(model, images, blocks, final_norm=False) if blocks else []
    features = []
    for spec in specs:
        if spec is None:
            features.append(model(images).float())
            continue
        norm: Any = model.norm if spec.final_norm else nn.Identity()
        parts = [norm(block[:, 0]) for block in tokens[blocks - spec.n_last_blocks :]]
        if spec.avgpool:
            prefix: Any = getattr(model, "num_prefix_tokens", 1)
            parts.append(norm(tokens[-1][:, prefix:]).mean(dim=1))
        features.append(torch.cat(parts, dim=-1).float())
    return features


def _merge_shares(share: Tensor, total: int) -> Tensor:
    """All ranks' strided shares ``rank::world`` back in the original order, on every rank."""
    world = dist.get_world_size()
    rows = -(-total // world)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros((rows, *share.shape[1:]), dtype=share.dtype, device=device)
    padded[: len(share)] = share.to(device)
    merged = share.new_empty((total, *share.shape[1:]))
    for source in range(world):
        part = padded.clone() if source == dist.get_rank() else torch.empty_like(padded)
        dist.broadcast(part, source)
        target = merged[source::world]
        target.copy_(part[: len(target)])
    return merged


@torch.no_grad()
def extract_feature_set(
    model: nn.Module,
    loader: Iterable[Any],
    features: Mapping[str, FeatureSpec | None],
    device: torch.device | str = "cpu",
    *,
    precision: torch.dtype = torch.float32,
    distributed: bool = False,
    progress: bool = True,
    name: str = "images",
    total: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Several features of every image from one pass; see ``extract_features``.

    ``total`` images are what the progress bar counts to.
    """
    device = torch.device(device)
    model = model.to(device).eval()
    chunks: dict[str, list[Tensor]] = {key: [] for key in features}
    labels: list[Tensor] = []
    amp = torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
    done = 0
    with tqdm(total=total, desc=f"features of {name}", unit="img", disable=not progress) as bar:
        for images, batch_labels in loader:
            with amp:
                found = backbone_features(
                    model, images.to(device, non_blocking=True), list(features.values())
                )
            for key, value in zip(features, found, strict=True):
                bad = first_non_finite_row(value)
                if bad is not None:
                    raise NonFiniteFeaturesError(
                        f"feature {key!r} of image {done + bad} of {name} holds a NaN or infinity: "
                        "the backbone is broken"
                    )
                chunks[key].append(value.cpu())
            labels.append(torch.as_tensor(batch_labels).cpu())
            done += len(images)
            bar.update(len(images))
    if not labels and not distributed:
        raise ValueError(f"{name}: there is no image to extract features from")
    rows = {key: torch.cat(value) for key, value in chunks.items()}
    all_labels = torch.cat(labels)
    if distributed:
        count = torch.tensor(len(all_labels))
        count = count.cuda() if dist.get_backend() == "nccl" else count
        dist.all_reduce(count)
        rows = {key: _merge_shares(value, int(count)) for key, value in rows.items()}
        all_labels = _merge_shares(all_labels, int(count))
    return rows, all_labels


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    feature: str | FeatureSpec | Mapping[str, Any] = "cls",
    device: torch.device | str = "cpu",
    *,
    precision: torch.dtype = torch.float32,
    distributed: bool = False,
    progress: bool = True,
    name: str = "images",
) -> tuple[Tensor, Tensor]:
    """One feature of every image that ``loader`` yields.

    Args:
        model: a timm ViT (moved to ``device`` and set to eval mode), or any module that maps images
            to ``(B, D)``.
        loader: yields ``(images (B, 3, H, W), labels (B,))``.
        feature: see ``resolve_feature``.
        device: where the model runs.
        precision: ``torch.float32``, or ``torch.bfloat16`` / ``torch.float16`` for autocast.
        distributed: each rank's ``loader`` yields the share that ``images.rank_share`` gives (at
            least one image); every rank gets the whole, in the listing's order.
        progress: show a progress bar with the rate.
        name: of the images, for the bar and messages.

    Returns:
        Features ``(N, D)`` float32 and labels ``(N,)``, on the CPU.

    Raises:
        ValueError: if a feature is unknown or not finite, or there is no image.

    Example:
        >>> batches = [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))]
        >>> features, labels = extract_features(PixelFeatures(2), batches, progress=False)
        >>> features.shape, labels.tolist()
        (torch.Size([2, 12]), [0, 1])
    """
    spec = resolve_feature(feature, model)
    features, labels = extract_feature_set(
        model,
        loader,
        {"feature": spec},
        device,
        precision=precision,
        distributed=distributed,
        progress=progress,
        name=name,
    )
    return features["feature"], labels
