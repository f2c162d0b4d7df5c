"""Networks that are no plain ViT: timm builds them by name, from the arguments that their file tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "NamedShape", "check_named_kwargs", "named_shape"]

# the host's name -> timm's name of the same network, tensor by tensor
NETWORKS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 50)}
NETWORKS |= {f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")}
NETWORKS |= {
    f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")
}
# arguments of the host's ResNets, which are torchvision's, without effect on a trained network
_OF_TORCHVISION = ("zero_init_residual",)
_CIFAR = ("cifar10", "cifar100")


@dataclass(frozen=True)
class NamedShape:
    """What timm needs to build a network whose feature is its pooled output.

    Attributes:
        architecture: name in timm.
        embed_dim: width ``D`` of the feature.
        img_size: pixels ``(height, width)`` of the images that it was trained on.
        arguments: keyword arguments for timm.
        cifar: whether the stem is solo-learn's for small images: a 3 x 3 convolution, no pooling.
    """

    architecture: str
    embed_dim: int
    img_size: tuple[int, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cifar: bool = False
    in_chans: int = 3

    @property
    def model_args(self) -> dict[str, Any]:
        """Keyword arguments that turn ``architecture`` into this network."""
        return dict(self.arguments)

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.architecture}{' (CIFAR stem)' if self.cifar else ''}"

    @property
    def hub(self) -> tuple[str, str, str, bool]:
        """For timm's configuration: pooling, first layer, classifier, whether the size is fixed."""
        if self.architecture.startswith("resnet"):
            return "avg", "conv1", "fc", False
        if self.architecture.startswith("convnext"):
            return "avg", "stem.0", "head.fc", False
        return "avg", "patch_embed.proj", "head.fc", True

    def __str__(self) -> str:
        told = "".join(f", {key}={value}" for key, value in self.arguments.items())
        return f"{self.name} (width {self.embed_dim}{told})"

    def build(self) -> nn.Module:
        """The untrained network without classifier; images ``(B, 3, H, W)`` to ``(B, D)``."""
        model: Any = timm.create_model(
            self.architecture, pretrained=False, num_classes=0, **self.model_args
        )
        if self.cifar:
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            model.maxpool = nn.Identity()
        return model  # type: ignore[no-any-return]


def check_named_kwargs(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a network that could be trained and not read again.

    Args:
        name: ``backbone.name``, no ViT.
        kwargs: ``backbone.kwargs``.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right.

    Example:
        >>> check_named_kwargs("resnet18", {"groups": 2})
        Traceback (most recent call last):
        ValueError: backbone.kwargs.groups=2 is not supported with backbone.name=resnet18: ...
    """
    if name not in NETWORKS:
        raise ValueError(
            f"backbone.name={name!r} is not supported: its checkpoint could be read by no evaluation; choose "
            f"a ViT (vit_tiny, vit_small, vit_base, vit_large) or one of {', '.join(NETWORKS)}"
        )
    if not name.startswith("resnet"):
        return
    for key, value in kwargs.items():
        if key not in _OF_TORCHVISION:
            raise ValueError(
                f"backbone.kwargs.{key}={value!r} is not supported with backbone.name={name}: a loaded "
                "network could have other features than the trained one; leave it out"
            )


def _told(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """timm's name and arguments, from a run's config or from ``config.json``."""
    backbone = config.get("backbone")
    if isinstance(backbone, Mapping) and backbone.get("name") in NETWORKS:
        name, kwargs = str(backbone["name"]), dict(backbone.get("kwargs") or {})
        check_named_kwargs(name, kwargs)
        if name.startswith("resnet"):
            kwargs = {}
        data = config.get("data")
        small = isinstance(data, Mapping) and data.get("dataset") in _CIFAR
        if name.startswith("swin") and small:
            kwargs["window_size"] = 4  # the host's
        return NETWORKS[name], kwargs
    if config.get("architecture") in NETWORKS.values():
        return str(config["architecture"]), dict(config.get("model_args") or {})
    return None


def _size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of the images: the exported configuration's, else the first crop's."""
    own = config.get("pretrained_cfg")
    if isinstance(own, Mapping) and own.get("input_size"):
        return int(own["input_size"][1]), int(own["input_size"][2])
    crops = config.get("augmentations")
    first = crops[0] if isinstance(crops, list) and crops else {}
    side = int(first.get("crop_size", 224)) if isinstance(first, Mapping) else 224
    return side, side


def named_shape(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> NamedShape | None:
    """The network that the file's config names, or None if that is no network of ``NETWORKS``.

    Args:
        tensors: of the backbone.
        config: settings stored with them.

    Raises:
        ValueError: if timm cannot build it with the arguments that the config tells.
    """
    found = _told(config)
    if found is None:
        return None
    architecture, arguments = found
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(
                architecture, pretrained=False, num_classes=0, **arguments
            )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {architecture} with {arguments}: {error}") from error
    stem = tensors.get("conv1.weight")
    cifar = stem is not None and tuple(stem.shape[2:]) == (3, 3)
    return NamedShape(
        architecture,
        int(model.num_features),
        _size(config),
        arguments,
        cifar and "resnet" in architecture,
    )
