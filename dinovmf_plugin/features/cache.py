"""Features on disk: a file knows which backbone, images, transform and feature made it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from dinovmf_plugin.features.checks import check_features
from dinovmf_plugin.runs.files import write_file

__all__ = ["FeatureKey", "load_feature_file", "save_feature_file"]

_FORMAT = "dinovmf_plugin features 1"


@dataclass(frozen=True)
class FeatureKey:
    """Everything that a set of features depends on.

    Attributes:
        backbone: identity of the network (a hash of its file, and which network in it).
        images: digest of the image listing.
        transform: of the images, in words.
        feature: which tokens, in words.
        precision: of the forward pass.
    """

    backbone: str
    images: str
    transform: str
    feature: str
    precision: str = "float32"

    def file_name(self, name: str) -> str:
        """A readable file name that is different for every key.

        Example:
            >>> FeatureKey("a", "b", "c", "d").file_name("train")
            'train-...safetensors'
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{name}-{digest[:16]}.safetensors"


def save_feature_file(
    path: str | Path,
    features: Tensor,
    labels: Tensor,
    key: FeatureKey,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write features ``(N, D)`` as ``dtype`` and labels ``(N,)``, with their key, in one step.

    Raises:
        ValueError: if float16 cannot hold a feature, or features and labels do not fit.
        OSError: if the disk is full or the folder cannot be written.
    """
    stored = features.to(dtype)
    check_features(stored, labels, f"{dtype}".removeprefix("torch."))
    metadata = {"format": _FORMAT, **asdict(key)}
    tensors = {"features": stored.contiguous(), "labels": labels.contiguous()}
    write_file(path, save(tensors, metadata))


def load_feature_file(path: str | Path, key: FeatureKey | None = None) -> tuple[Tensor, Tensor]:
    """Features ``(N, D)`` float32 and labels ``(N,)`` of a file.

    Args:
        path: a file that ``save_feature_file`` wrote.
        key: what the features must have been made with; None accepts any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no feature file, is broken, or was made with another backbone, other
            images, another transform or feature; the differences are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no feature file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is broken or no feature file: {error}") from error
    if metadata.get("format") != _FORMAT or set(tensors) != {"features", "labels"}:
        raise ValueError(f"{path} is no feature file of this project")
    if key is not None:
        differences = [
            f"{name}: the file has {metadata.get(name)!r}, wanted is {value!r}"
            for name, value in asdict(key).items()
            if metadata.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"feature file {path} was made with something else ({'; '.join(differences)}): "
                "delete it or name another"
            )
    features, labels = tensors["features"].float(), tensors["labels"]
    check_features(features, labels, str(path))
    return features, labels
