"""One frozen network, read once: backbone, head, center, digest and the statistics of its images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dinovmf_plugin.checkpoints.architecture import ViTShape, build_vit
from dinovmf_plugin.checkpoints.heads import HeadSettings, head_from, with_head
from dinovmf_plugin.checkpoints.layouts import StoredWeights, Which, read_weights
from dinovmf_plugin.checkpoints.loading import network_from
from dinovmf_plugin.checkpoints.named import NamedShape
from dinovmf_plugin.checkpoints.reading import resolve_file
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.core.vit import has_tokens
from dinovmf_plugin.data.channels import IMAGENET, Statistics, channel_statistics
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.extraction import PixelFeatures
from dinovmf_plugin.features.published import as_network, published_network
from dinovmf_plugin.features.settings import NetworkSource
from dinovmf_plugin.report.paper import method_label
from dinovmf_plugin.runs.files import file_digest

__all__ = ["Network", "load_network", "load_source", "random_name", "untrained_like"]

_PIXEL_SIZE = 32


@dataclass(frozen=True)
class Network:
    """A network and where it came from.

    Attributes:
        model: maps images to features, see ``features.backbone_features``.
        label: short name for tables, such as ``DINO-vMF`` or ``untrained``.
        identity: what distinguishes its features from those of any other network.
        record: what the results say about it: path, sha256, network, architecture, load report.
        shape: how timm builds it, None for pixels.
        statistics: what its images are normalized by.
        head: projection head in eval mode, if it was asked for; ``head.last_layer`` holds the prototypes.
        head_settings: temperatures and switches of the head.
        center: the stored center ``(K,)``, None if the file has none that fits the prototypes.
    """

    model: nn.Module
    label: str
    identity: str
    record: dict[str, Any]
    shape: ViTShape | NamedShape | None = None
    statistics: Statistics = IMAGENET
    head: DINOHead | None = None
    head_settings: HeadSettings | None = None
    center: Tensor | None = None

    @property
    def vit(self) -> Any:
        """The backbone as a Vision Transformer, for what needs tokens.

        Raises:
            ValueError: if it is none.
        """
        if not has_tokens(self.model):
            raise ValueError(
                f"checkpoint={self.record['checkpoint']} has no patch tokens: a Vision Transformer is "
                "needed here"
            )
        return self.model

    @property
    def mixture_head(self) -> tuple[DINOHead, HeadSettings]:
        """The head and its settings, for what needs prototypes.

        Raises:
            ValueError: if the network was loaded without.
        """
        if self.head is None or self.head_settings is None:
            raise ValueError(f"checkpoint={self.record['checkpoint']} was loaded without its head")
        return self.head, self.head_settings

    @property
    def prototypes(self) -> Prototypes:
        """The prototype layer of the head."""
        return self.mixture_head[0].last_layer

    @property
    def image_size(self) -> int:
        """Side of the images that the network was made for, in pixels; 224 where it is none."""
        if self.shape is not None:
            return int(self.shape.img_size[0])
        return int(self.vit.patch_embed.img_size[0]) if has_tokens(self.model) else 224

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def to(self, device: torch.device | str) -> Network:
        """The same network, its modules moved to ``device``."""
        self.model.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def normalized(self, transform: CenterCrop) -> CenterCrop:
        """The transform with the channel statistics that the network was trained with."""
        return replace(transform, **self.statistics._asdict())


def _random_vit(build: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build()
    return model.eval()


def untrained_like(network: Network, seed: int = 0) -> Network:
    """The same architecture with random weights, for the same pixels: what the images alone give.

    Raises:
        ValueError: for raw pixels.
    """
    shape = network.shape
    if shape is None:
        raise ValueError(f"{network.label} is no network: it has no untrained twin")
    identity = f"untrained {shape} seed {seed}"
    if isinstance(shape, NamedShape):
        named = shape
        model = _random_vit(lambda: as_network(named.build(), named.name), seed)
    else:
        vit_shape = shape
        model = _random_vit(lambda: build_vit(vit_shape, weight_init=""), seed)
    record = {"checkpoint": identity}
    return Network(model, "untrained", identity, record, shape, network.statistics)


def _pixels(size: int) -> Network:
    identity = f"pixels {size}x{size}"
    return Network(PixelFeatures(size), "pixels", identity, {"checkpoint": identity})


def random_name(checkpoint: str) -> str:
    """timm's name in ``random:NAME``.

    Raises:
        ValueError: if timm has no Vision Transformer of that name.

    Example:
        >>> random_name("random:vit_tiny_patch16_224")
        'vit_tiny_patch16_224'
    """
    name = checkpoint.removeprefix("random:")
    if name not in timm.list_models("vit_*") + timm.list_models("deit_*"):
        raise ValueError(
            f"checkpoint=random:{name} names no Vision Transformer of timm, such as "
            "random:vit_tiny_patch16_224"
        )
    return name


def _random_by_name(name: str, seed: int) -> Network:
    model = _random_vit(lambda: timm.create_model(name, num_classes=0), seed)
    identity = f"untrained {name} seed {seed}"
    return Network(model, "untrained", identity, {"checkpoint": identity})


def _published(checkpoint: str, weight_file: str | Path | None) -> Network:
    name = checkpoint.removeprefix("timm:")
    if not weight_file:
        raise ValueError(
            f"checkpoint={checkpoint} needs weight_file=FILE, a local file with its weights: nothing is "
            "downloaded"
        )
    model, report, shape, about = published_network(name, weight_file)
    digest = file_digest(report.path)
    record = {
        "checkpoint": checkpoint,
        "weight_file": str(report.path),
        "sha256": digest,
        "architecture": name,
        "load_report": str(report),
    }
    statistics = channel_statistics(about)
    return Network(model, name, f"timm {name} sha256 {digest}", record, shape, statistics)


def load_network(
    checkpoint: str | Path | None,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    seed: int = 0,
    head: bool = False,
    weight_file: str | Path | None = None,
) -> Network:
    """The network that ``checkpoint`` names.

    Args:
        checkpoint: path of any weight file that ``checkpoints.load_backbone`` reads;
            ``random:NAME`` for timm's untrained ViT of that name; ``timm:NAME`` for timm's network with
            the weights of a local file; ``pixels`` for raw pixels.
        which: ``teacher`` or ``student``.
        model_name: see ``load_backbone``.
        num_heads: see ``load_backbone``.
        seed: of the random weights.
        head: whether to load the projection head and the center too, which a file must have then.
        weight_file: of ``timm:NAME``; nothing is downloaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file or a name cannot be used, or has no head where one is needed.

    Example:
        >>> load_network("pixels").identity
        'pixels 32x32'
    """
    if not checkpoint:
        raise ValueError(
            f"checkpoint={checkpoint!r} must be set: a weight file, random:TIMM_NAME, "
            "timm:TIMM_NAME or pixels"
        )
    checkpoint = str(checkpoint)
    if which not in ("teacher", "student"):
        raise ValueError(f"which={which!r} must be teacher or student")
    if weight_file and not checkpoint.startswith("timm:"):
        raise ValueError(
            f"weight_file={weight_file} is that of checkpoint=timm:NAME, not of {checkpoint}"
        )
    if head and (checkpoint == "pixels" or checkpoint.startswith(("random:", "timm:"))):
        raise ValueError(
            f"checkpoint={checkpoint} has no prototypes: name a checkpoint with a head"
        )
    if checkpoint == "pixels":
        return _pixels(_PIXEL_SIZE)
    if checkpoint.startswith("random:"):
        return _random_by_name(random_name(checkpoint), seed)
    if checkpoint.startswith("timm:"):
        return _published(checkpoint, weight_file)
    file = resolve_file(checkpoint)
    stored = read_weights(file, which)
    model, report, shape = network_from(stored, model_name=model_name, num_heads=num_heads)
    digest = file_digest(file)
    record = {
        "checkpoint": str(file),
        "sha256": digest,
        "layout": report.source,
        "which": report.which,
        "architecture": report.model_name,
        "load_report": str(report),
    }
    identity = f"sha256 {digest} {report.which} {shape}"
    network = Network(
        model,
        method_label(stored.config, stored.source),
        identity,
        record,
        shape,
        channel_statistics(stored.config),
    )
    return _with_head(network, stored) if head else network


def _with_head(network: Network, stored: StoredWeights) -> Network:
    stored = with_head(stored)
    head, settings = head_from(stored)
    width = next(head.mlp.parameters()).shape[1]
    given = network.shape.embed_dim if network.shape is not None else 0
    if width != given:
        raise ValueError(
            f"{stored.path}: the head takes {width} features, the backbone gives {given}"
        )
    center = stored.center
    if center is not None and len(center) != head.last_layer.num_prototypes:
        center = None
    return replace(network, head=head, head_settings=settings, center=center)


def load_source(source: NetworkSource, *, seed: int = 0, head: bool = False) -> Network:
    """The network that a command's settings name; see ``load_network``."""
    return load_network(
        source.checkpoint,
        which=source.which,
        model_name=source.model_name,
        num_heads=source.num_heads,
        seed=seed,
        head=head,
        weight_file=source.weight_file,
    )
