"""Global image descriptors for retrieval: the teacher's CLS token over several scales."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from dinovmf_plugin.core.vit import forward_tokens, has_tokens
from dinovmf_plugin.data.channels import IMAGENET, Statistics
from dinovmf_plugin.evaluation.retrieval.dataset import Box, read_image
from dinovmf_plugin.runs.files import write_file

__all__ = [
    "DINO_SCALES",
    "ExtractionReport",
    "ImageFiles",
    "extract_descriptors",
    "global_descriptor",
]

#: The three scales of DINO's multi-scale retrieval.
DINO_SCALES = (1.0, 2**-0.5, 0.5)
#: Images between two writes: what a stopped run has to compute again.
_SHARD = 64


def global_descriptor(vit: nn.Module, images: Tensor, scales: Sequence[float] = (1.0,)) -> Tensor:
    """CLS after the final norm, averaged over scales, on the unit sphere.

    Args:
        vit: a timm ``VisionTransformer``, or a module whose output ``(B, D)`` is the feature.
        images: normalized images ``(B, 3, H, W)``.
        scales: factors by which the images are resized (bilinear); the raw CLS tokens are averaged
            before the one l2 normalization, as DINO has it.

    Returns:
        ``(B, D)`` unit vectors.

    Raises:
        ValueError: if a resized image is smaller than one patch.

    Differs from upstream: the norm is each image's own, not that of the whole batch, so that any
    batch size gives what upstream gives for one image.
    """
    total: Tensor | None = None
    for scale in scales:
        resized = (
            images
            if scale == 1
            else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        )
        token = forward_tokens(vit, resized)[:, 0] if has_tokens(vit) else vit(resized)
        total = token if total is None else total + token
    if total is None:
        raise ValueError("scales is empty: give at least one factor, such as 1.0")
    return F.normalize(total.float(), dim=1)


class ExtractionReport(TypedDict):
    """What ``extract_descriptors`` did.

    ``computed`` counts images of this call only; ``seconds_per_image`` is wall clock over all
    images, an earlier call's too; ``truncated`` are indices of files that end early.
    """

    images: int
    computed: int
    seconds_per_image: float
    truncated: list[int]


class ImageFiles(Dataset[tuple[int, Tensor, bool]]):
    """Image files, shrunk and normalized: ``(index, image (3, H, W), whether it was truncated)``."""

    def __init__(
        self,
        paths: Sequence[Path],
        imsize: int | None,
        boxes: Sequence[Box | None] | None = None,
        statistics: Statistics = IMAGENET,
    ) -> None:
        self.paths = paths
        self.imsize = imsize
        self.boxes = boxes
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self.paths)

    def check_sizes(self, scale: float, patch_size: tuple[int, int]) -> None:
        """Refuse pictures that are smaller than a patch, by their headers, before any is computed.

        Raises:
            ValueError: naming the first such file.
        """
        for path in self.paths:
            width, height = _picture_size(path)
            factor = min(1.0, (self.imsize or max(width, height)) / max(width, height)) * scale
            # one pixel of grace for rounding: what is closer than that is named when its turn comes
            if height * factor + 1 < patch_size[0] or width * factor + 1 < patch_size[1]:
                raise ValueError(
                    f"{path} has {height} x {width} pixels (height x width), which imsize={self.imsize} and "
                    f"the smallest scale {scale:g} make smaller than one patch of {patch_size[0]} x "
                    f"{patch_size[1]}: take it out, or choose larger ones"
                )

    def __getitem__(self, index: int) -> tuple[int, Tensor, bool]:
        box = None if self.boxes is None else self.boxes[index]
        image, truncated = read_image(self.paths[index], self.imsize, box)
        pixels = transforms.to_dtype(transforms.to_image(image), torch.float32, scale=True)
        mean, std = map(list, self.statistics)
        return index, transforms.normalize(pixels, mean, std), truncated


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:06d}.npz"


def _save_shard(
    path: Path, features: list[NDArray[np.float32]], truncated: list[int], seconds: float
) -> None:
    write_file(
        path,
        lambda file: np.savez(
            file,
            features=np.stack(features),
            truncated=np.asarray(truncated, dtype=np.int64),
            seconds=np.asarray(seconds),
        ),
    )


def extract_descriptors(
    vit: nn.Module,
    files: ImageFiles,
    folder: Path,
    *,
    scales: Sequence[float] = (1.0,),
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    name: str = "images",
) -> tuple[NDArray[np.float32], ExtractionReport]:
    """Descriptors of all files, one image at a time (their sizes differ), kept in ``folder``.

    Every 64 images are written as one file; a run that starts again loads these and computes the
    rest. The caller sees to it that ``folder`` belongs to the same model and settings.

    Returns:
        float32 ``(images, D)`` on the unit sphere, and the report.
    """
    starts = range(0, len(files), _SHARD)
    todo = [start for start in starts if not _shard_path(folder, start).is_file()]
    indices = [i for start in todo for i in range(start, min(start + _SHARD, len(files)))]
    vit = vit.to(device).eval()
    loader = DataLoader(
        torch.utils.data.Subset(files, indices), batch_size=None, num_workers=num_workers
    )
    features: list[NDArray[np.float32]] = []
    truncated: list[int] = []
    begun = time.perf_counter()
    progress = tqdm(
        loader, desc=name, unit="image", total=len(files), initial=len(files) - len(indices)
    )
    for index, image, is_truncated in progress:
        try:
            with torch.inference_mode():
                descriptor = global_descriptor(vit, image[None].to(device), scales)
        except ValueError as error:
            raise ValueError(f"{files.paths[index]}: at scales {list(scales)} {error}") from error
        features.append(descriptor[0].cpu().numpy())
        if is_truncated:
            truncated.append(index)
        if len(features) == _SHARD or index == len(files) - 1:
            now = time.perf_counter()
            start = index // _SHARD * _SHARD
            _save_shard(_shard_path(folder, start), features, truncated, now - begun)
            features, truncated, begun = [], [], now
    shards = [np.load(_shard_path(folder, start), allow_pickle=False) for start in starts]
    return np.concatenate([shard["features"] for shard in shards]), {
        "images": len(files),
        "computed": len(indices),
        "seconds_per_image": float(sum(shard["seconds"] for shard in shards)) / len(files),
        "truncated": [int(i) for shard in shards for i in shard["truncated"]],
    }
