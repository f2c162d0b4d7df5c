"""Where images come from: a source by its name, opened or refused in one sentence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinovmf_plugin.data.folders import class_names, list_images
from dinovmf_plugin.data.source import Listing
from dinovmf_plugin.data.sources.h5 import list_h5
from dinovmf_plugin.data.sources.hf import list_hub
from dinovmf_plugin.data.sources.labels import NoLabelsError
from dinovmf_plugin.data.sources.stream import HubStream, list_stream, stream_classes
from dinovmf_plugin.data.sources.tar import list_shards, list_tar

__all__ = ["SOURCES", "STREAMS", "Location", "check_source"]

SOURCES = ("folder", "tar", "wds", "hfds", "hfids", "h5")
STREAMS = ("hfids",)
"""Sources that training reads from beginning to end; what lists images reads the same files by row."""
_TUNED = {
    "split": ("hfds", "hfids"),
    "image_key": ("wds", "hfds", "hfids"),
    "label_key": ("wds", "hfds", "hfids"),
}


def check_source(source: str) -> str:
    """The name of a source, if there is one of that name (``ValueError``)."""
    if source not in SOURCES:
        raise ValueError(f"data.source must be one of {SOURCES}, got {source!r}")
    return source


@dataclass(frozen=True)
class Location:
    """A set of images somewhere.

    Attributes:
        path: folder or file.
        key: config key of the path, for messages.
        source: one of ``SOURCES``.
        split: of a Hugging Face data set.
        image_key: where a sample of ``wds``, ``hfds`` and ``hfids`` has its image.
        label_key: where it has its label.

    Raises:
        ValueError: there is no such source, or it has no use for a given option.
    """

    path: str
    key: str = "data.train_path"
    source: str = "folder"
    split: str | None = None
    image_key: str | None = None
    label_key: str | None = None

    def __post_init__(self) -> None:
        check_source(self.source)
        for name, sources in _TUNED.items():
            if getattr(self, name) is not None and self.source not in sources:
                part = "val" if self.key == "data.val_path" else "train"
                shown = f"{part}_split" if name == "split" else name
                raise ValueError(
                    f"data.{shown}={getattr(self, name)!r} is for data.source={' or '.join(sources)}, and "
                    f"data.source={self.source}"
                )

    @property
    def _keys(self) -> dict[str, Any]:
        keys = {"image_key": self.image_key, "label_key": self.label_key}
        return keys if self.source == "wds" else {"split": self.split, **keys}

    def _list(self, labeled: bool) -> Listing:
        if self.source == "folder":
            return list_images(self.path, labeled=labeled, key=self.key)
        if self.source == "tar":
            return list_tar(self.path, labeled=labeled, key=self.key)
        if self.source == "h5":
            return list_h5(self.path, labeled=labeled, key=self.key)
        if self.source == "wds":
            return list_shards(self.path, labeled=labeled, key=self.key, **self._keys)
        return list_hub(self.path, labeled=labeled, key=self.key, **self._keys)

    def listed(self, labeled: bool | Literal["auto"] = True) -> Listing:
        """List the images.

        Args:
            labeled: whether to read labels; ``auto``: if there are any.

        Raises:
            FileNotFoundError, ValueError, ImportError: what cannot be read, in one sentence.
        """
        if labeled != "auto":
            return self._list(labeled)
        if self.source == "folder":
            if not Path(self.path).is_dir():
                raise FileNotFoundError(f"{self.key}={self.path!r} is not a folder")
            return self._list(bool(class_names(self.path)))
        try:
            return self._list(True)
        except NoLabelsError:
            return self._list(False)

    def stream(self, labeled: bool, check: str, rank: int, world_size: int) -> HubStream:
        """Read the stream once, to count and check its images; see :func:`stream.list_stream`."""
        if self.source not in STREAMS:
            raise ValueError(f"data.source={self.source} is no stream")
        found = list_stream(
            self.path,
            labeled=labeled,
            key=self.key,
            check=check,
            rank=rank,
            world_size=world_size,
            **self._keys,
        )
        warnings.warn(
            f"data.source={self.source} is a stream, which cannot seek: each process reads all of it, and a "
            "run that is resumed in the middle of an epoch first reads again what it had seen "
            "(data.source=hfds reads the same files by row)",
            stacklevel=3,
        )
        return found

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, without more listing than needed."""
        if self.source == "folder":
            return class_names(self.path)
        if self.source in STREAMS:
            return stream_classes(self.path, self.key, **self._keys)
        return self._list(True).classes
