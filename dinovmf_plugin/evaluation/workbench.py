"""One frozen network, its images, and the features that the evaluations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinovmf_plugin.core.distributed import Processes
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.evaluation.settings import CommonSettings, EvaluationSettings, Section
from dinovmf_plugin.features.cache import FeatureKey, load_feature_file, save_feature_file
from dinovmf_plugin.features.extraction import extract_feature_set, resolve_feature
from dinovmf_plugin.features.images import (
    ImageSet,
    describe,
    image_folder,
    loader_for,
    rank_share,
)
from dinovmf_plugin.features.network import Network
from dinovmf_plugin.features.settings import PRECISIONS

__all__ = ["Images", "Run", "Workbench", "solve_alone"]


class Images:
    """The training and validation folders of a run, listed once when first needed."""

    def __init__(self, settings: CommonSettings) -> None:
        self._data = settings.data

    def _list(self, path: str | None, key: str, classes: Sequence[str] = ()) -> ImageSet:
        return image_folder(
            path,
            key,
            classes=classes,
            check_images=self._data.check_images,
            skip_unreadable=self._data.skip_unreadable,
            keys=self._data,
        )

    @cached_property
    def train(self) -> ImageSet:
        """``data.train_path``."""
        return self._list(self._data.train_path, "data.train_path")

    @cached_property
    def val(self) -> ImageSet:
        """``data.val_path``, with the training set's labels."""
        return self._list(self._data.val_path, "data.val_path", self.train.classes)


@dataclass(frozen=True)
class Workbench:
    """What an evaluation works with.

    Attributes:
        backbone: the frozen network.
        settings: of the run.
        images: training and validation folders.
        device: where the network runs.
        cache_dir: where features are kept.
        processes: this process among its siblings.
    """

    backbone: Network
    settings: EvaluationSettings
    images: Images
    device: torch.device
    cache_dir: Path
    processes: Processes

    @property
    def progress(self) -> bool:
        """Whether this process shows progress bars."""
        return self.settings.progress and self.processes.rank == 0

    def describe_feature(self, feature: str | Mapping[str, Any]) -> str:
        """The feature in words, as results and feature files record it."""
        spec = resolve_feature(feature, self.backbone.model)
        return "output of the network" if spec is None else str(spec)

    def transform(self, section: Section) -> CenterCrop:
        """The section's test transform with the network's own channel statistics."""
        return replace(section.transform, **self.backbone.statistics._asdict())

    def loader(self, images: ImageSet, transform: CenterCrop) -> Any:
        """Batches of this process's share of ``images``."""
        data = self.settings.data
        return loader_for(
            rank_share(images, self.processes.rank, self.processes.world_size),
            transform,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            data_format=data.format,
            device=self.device,
        )

    def features(
        self,
        images: ImageSet,
        features: Mapping[str, str | Mapping[str, Any]],
        transform: CenterCrop,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features ``{name: (N, D)}`` and labels ``(N,)``, from the cache where it has them.

        What is missing is extracted in one pass of the network and kept.

        Raises:
            ValueError: if a cached file was made with something else, or a feature is not finite.
        """
        world = self.processes.world_size
        if len(images) < world:
            raise ValueError(
                f"{images.name}: {len(images)} images are fewer than {world} processes"
            )
        words = describe(transform, self.settings.data.format)
        files = {}
        for name, feature in features.items():
            key = FeatureKey(
                backbone=self.backbone.identity,
                images=images.digest,
                transform=words,
                feature=self.describe_feature(feature),
                precision=self.settings.precision,
            )
            files[name] = (self.cache_dir / key.file_name(images.name), key)
        found: dict[str, Tensor] = {}
        labels = images.labels
        for name, (path, key) in files.items():
            if self.processes.agree(path.is_file()):
                found[name], labels = load_feature_file(path, key)
        missing = [name for name in features if name not in found]
        if missing:
            specs = {name: resolve_feature(features[name], self.backbone.model) for name in missing}
            extracted, labels = extract_feature_set(
                self.backbone.model,
                self.loader(images, transform),
                specs,
                self.device,
                precision=PRECISIONS[self.settings.precision],
                distributed=self.processes.active,
                progress=self.progress,
                name=images.name,
                total=-(-len(images) // world),
            )
            dtype = PRECISIONS[self.settings.cache_dtype]
            for name in missing:
                # rounded as in the file, so that a run from the cache repeats this one exactly
                found[name] = extracted[name].to(dtype).float()
                if self.processes.rank == 0:
                    save_feature_file(files[name][0], found[name], labels, files[name][1], dtype)
        return {name: found[name] for name in features}, labels


Run = Callable[[Workbench], dict[str, Any]]
"""An evaluation that is prepared: from a network on the bench to its result."""


def solve_alone(bench: Workbench, solve: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let the first process solve and give the result to all."""
    if not bench.processes.active:
        return solve()
    box = [solve() if bench.processes.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result: dict[str, Any] = box[0]  # type: ignore[assignment]
    return result
