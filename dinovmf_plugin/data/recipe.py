"""Multi-crop recipes: one reading of solo-learn's ``augmentations`` list for every backend.

A recipe is a list of pipelines, each with ``crop_size``, ``num_crops`` and one node per operation
(the format of solo-learn's ``augmentations/*.yaml``). :func:`parse_recipe` checks it once and
expands it to one :class:`Crop` per crop, in order; the torchvision and the DALI loader read nothing
else, so a recipe cannot mean two things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from omegaconf import OmegaConf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Per-channel statistics that solo-learn uses for its small datasets; all others use ImageNet's or
# the recipe's own.
DATASET_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "imagenet100": (IMAGENET_MEAN, IMAGENET_STD),
}

INTERPOLATIONS = ("bicubic", "bilinear")
BLUR_RADIUS = (0.1, 2.0)
SOLARIZATION_THRESHOLD = 128
ASPECT_RATIO = (3.0 / 4.0, 4.0 / 3.0)

_JITTER_KEYS = ("prob", "brightness", "contrast", "saturation", "hue")
_NODES: dict[str, tuple[str, ...]] = {
    "rrc": ("enabled", "crop_min_scale", "crop_max_scale", "interpolation"),
    "color_jitter": _JITTER_KEYS,
    "grayscale": ("prob",),
    "gaussian_blur": ("prob",),
    "solarization": ("prob",),
    "equalization": ("prob",),
    "horizontal_flip": ("prob",),
}
_SCALARS = ("crop_size", "num_crops", "mean", "std")


@dataclass(frozen=True)
class Crop:
    """How one crop of a multi-crop recipe is made.

    The operations run in DINO's order: crop and resize, flip, color jitter, grayscale, blur,
    solarisation, equalisation, normalization.

    Attributes:
        size: side of the square crop in pixels.
        scale: smallest and largest crop area as a share of the image, or None for the largest
            centered square.
        interpolation: ``bicubic`` or ``bilinear``, both antialiased.
        jitter_prob: probability of the color jitter.
        brightness: relative range; the factor is uniform in ``[max(0, 1 - b), 1 + b]``.
        contrast: as ``brightness``.
        saturation: as ``brightness``.
        hue: half range of the hue shift in turns, at most 0.5.
        gray_prob: probability of turning gray (still three channels).
        blur_prob: probability of a Gaussian blur whose radius (standard deviation) is uniform in
            0.1 to 2 pixels.
        solarize_prob: probability of inverting the values from 128 on.
        equalize_prob: probability of equalising the histogram of each channel.
        flip_prob: probability of a horizontal flip.
        mean: per-channel mean subtracted at the end, values in [0, 1].
        std: per-channel standard deviation divided by at the end.
    """

    size: int
    scale: tuple[float, float] | None
    interpolation: str = "bicubic"
    jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    solarize_prob: float = 0.0
    equalize_prob: float = 0.0
    flip_prob: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


Recipe = tuple[Crop, ...]
"""The crops in the order in which methods receive them."""


def _number(where: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{where} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def _positive_int(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} must be a positive whole number, got {value!r}")
    return value


def _triple(where: str, value: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be three numbers, one per channel, got {value!r}") from None
    return first, second, third


def _node(where: str, pipeline: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    node = pipeline.get(name)
    if node is None:
        return {}
    if not isinstance(node, Mapping):
        raise ValueError(
            f"{where}.{name} must be a group of keys {list(_NODES[name])}, got {node!r}"
        )
    unknown = sorted(set(node) - set(_NODES[name]))
    if unknown:
        raise ValueError(f"{where}.{name}.{unknown[0]} is not a key, use {list(_NODES[name])}")
    return node


def _parse_pipeline(where: str, pipeline: Mapping[str, Any], dataset: str | None) -> list[Crop]:
    known = [*_NODES, *_SCALARS]
    unknown = sorted(set(pipeline) - set(known))
    if unknown:
        raise ValueError(
            f"{where}.{unknown[0]} is not a key of an augmentation pipeline, use {known}"
        )
    for key in ("crop_size", "num_crops", "rrc"):
        if pipeline.get(key) is None:
            raise ValueError(f"{where}.{key} is missing")

    rrc = _node(where, pipeline, "rrc")
    scale = None
    if rrc.get("enabled", True):
        for key in ("crop_min_scale", "crop_max_scale"):
            if rrc.get(key) is None:
                raise ValueError(f"{where}.rrc.{key} is missing")
        low = _number(f"{where}.rrc.crop_min_scale", rrc["crop_min_scale"], 0.0, 1.0)
        high = _number(f"{where}.rrc.crop_max_scale", rrc["crop_max_scale"], 0.0, 1.0)
        if not 0.0 < low <= high:
            raise ValueError(
                f"{where}.rrc.crop_min_scale must be above 0 and at most crop_max_scale "
                f"({high:g}), got {low:g}"
            )
        scale = (low, high)
    interpolation = rrc.get("interpolation", "bicubic")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"{where}.rrc.interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}"
        )

    probability = {
        name: _number(
            f"{where}.{name}.prob", _node(where, pipeline, name).get("prob", 0.0), 0.0, 1.0
        )
        for name in _NODES
        if name != "rrc"
    }
    jitter = _node(where, pipeline, "color_jitter")
    strength = {
        key: _number(
            f"{where}.color_jitter.{key}", jitter.get(key, 0.0), 0.0, 0.5 if key == "hue" else 10.0
        )
        for key in _JITTER_KEYS[1:]
    }
    default_mean, default_std = DATASET_STATISTICS.get(dataset or "", (None, None))
    mean = default_mean or _triple(f"{where}.mean", pipeline.get("mean", IMAGENET_MEAN))
    std = default_std or _triple(f"{where}.std", pipeline.get("std", IMAGENET_STD))
    if min(std) <= 0:
        raise ValueError(f"{where}.std must be positive, got {std}")

    crop = Crop(
        size=_positive_int(f"{where}.crop_size", pipeline["crop_size"]),
        scale=scale,
        interpolation=interpolation,
        jitter_prob=probability["color_jitter"],
        gray_prob=probability["grayscale"],
        blur_prob=probability["gaussian_blur"],
        solarize_prob=probability["solarization"],
        equalize_prob=probability["equalization"],
        flip_prob=probability["horizontal_flip"],
        mean=mean,
        std=std,
        **strength,
    )
    return [crop] * _positive_int(f"{where}.num_crops", pipeline["num_crops"])


def parse_recipe(
    augmentations: Sequence[Mapping[str, Any]], *, dataset: str | None = None
) -> Recipe:
    """Read and check solo-learn's list of augmentation pipelines.

    Args:
        augmentations: the config's ``augmentations`` list (plain containers or OmegaConf nodes). An
            operation that is left out is off. ``rrc.interpolation`` (``bicubic`` by default, or
            ``bilinear``) is the only key that solo-learn does not know; it ignores it.
        dataset: the config's ``data.dataset``; solo-learn's small datasets have their own mean and
            standard deviation, for others the pipeline's ``mean`` and ``std`` (ImageNet's by
            default) count.

    Returns:
        One :class:`Crop` per crop, in the order of the list.

    Raises:
        ValueError: a key is unknown or missing, a value is out of range or the large crops do not come
            first; the message names it.

    Differs from upstream:
        solo-learn reads unknown keys silently, so that a misspelt operation is never applied; with
        ``rrc.enabled: False`` it stretches the picture in DALI and keeps its shape in torchvision,
        here it is the largest centered square in both.

    Example:
        >>> scales = {"crop_min_scale": 0.2, "crop_max_scale": 1.0}
        >>> recipe = parse_recipe([{"crop_size": 32, "num_crops": 2, "rrc": scales}])
        >>> len(recipe), recipe[0].size, recipe[0].scale
        (2, 32, (0.2, 1.0))
    """
    listed = isinstance(augmentations, Sequence) and not isinstance(augmentations, str)
    if not listed or not len(augmentations):
        raise ValueError(
            f"augmentations must be a list of at least one pipeline, got {augmentations!r}"
        )
    crops: list[Crop] = []
    for position, pipeline in enumerate(augmentations):
        where = f"augmentations[{position}]"
        if not isinstance(pipeline, Mapping):
            raise ValueError(f"{where} must be a group of keys, got {pipeline!r}")
        crops.extend(_parse_pipeline(where, pipeline, dataset))
    sizes = [crop.size for crop in crops]
    large = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if any(size >= sizes[0] for size in sizes[large:]):
        raise ValueError(
            f"augmentations give crops of {sizes} pixels: list the large ones, all of one size, first; the "
            "teacher sees those, and smaller crops follow"
        )
    return tuple(crops)


def shipped_augmentations(name: str) -> list[dict[str, Any]]:
    """The ``augmentations`` list of a recipe that comes with this package.

    Args:
        name: a file of ``configs/augmentations`` without its ending.

    Returns:
        Plain containers, ready for :func:`parse_recipe`.

    Raises:
        ValueError: there is no such recipe; the message names those that exist.

    Example:
        >>> [crop.size for crop in parse_recipe(shipped_augmentations("dino_two_crops"))]
        [224, 224]
    """
    folder = resources.files("dinovmf_plugin.configs") / "augmentations"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    if name not in known:
        raise ValueError(f"the recipe {name!r} does not exist, use one of {known}")
    with resources.as_file(folder / f"{name}.yaml") as path:
        return cast("list[dict[str, Any]]", OmegaConf.to_container(OmegaConf.load(path)))
