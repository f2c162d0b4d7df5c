"""The keys that say where images are: the same for training and for whatever looks at a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import MinLen

from dinovmf_plugin.data.sources import SOURCES, Location
from dinovmf_plugin.runs.bounds import OneOf
from dinovmf_plugin.runs.settings import Doc, Settings, settings_of

__all__ = ["SourceKeys"]

_Name = Annotated[str, MinLen(1)]


@dataclass(frozen=True, kw_only=True)
class SourceKeys(Settings):
    """Where images are; ``data.train_path`` and ``data.val_path`` are of one source."""

    source: Annotated[
        str,
        OneOf(SOURCES),
        Doc(
            "folder; tar: archives of folders; wds: webdataset's shards; hfds: Hugging Face data set on "
            "disk, hfids: streamed; h5: one file, as solo-learn writes it"
        ),
    ] = "folder"
    train_split: Annotated[
        _Name | None, Doc("hfds, hfids: of what is read; null: the only one, or train")
    ] = None
    val_split: Annotated[
        _Name | None, Doc("the same of data.val_path; null: the only one, or validation")
    ] = None
    image_key: Annotated[
        _Name | None, Doc("hfds, hfids: column of the images; wds: their endings, such as jpg;png")
    ] = None
    label_key: Annotated[
        _Name | None,
        Doc("hfds, hfids: column of the labels; wds: field of NAME.json (null: NAME.cls)"),
    ] = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> SourceKeys:
        """Those of a recipe's ``data``."""
        names = settings_of(SourceKeys)
        return cls(**{name: data[name] for name in names if data.get(name) is not None})

    def location(self, path: str, key: str) -> Location:
        """Where the images of a path are.

        Args:
            path: folder or file.
            key: its config key; ``data.val_path`` has the validation split.
        """
        split = self.val_split if key == "data.val_path" else self.train_split
        return Location(path, key, self.source, split, self.image_key, self.label_key)
