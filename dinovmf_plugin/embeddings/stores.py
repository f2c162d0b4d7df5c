"""Tables of embeddings on disk that grow part by part and survive a kill at any moment.

=============  ====================================================================================
parquet        ``part-00000-of-00003.parquet`` ..: ``features`` is a list of fixed length
safetensors    ``part-00000-of-00003.safetensors`` ..: a tensor per column; the metadata's entry
               ``dinovmf_plugin`` is JSON and holds ``path``
npy            ``features.npy``, ``component.npy`` .., of all rows; ``path.npy`` holds bytes
=============  ====================================================================================
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from safetensors.torch import save

from dinovmf_plugin.runs.files import write_file, write_json

__all__ = ["ArrayStore", "Columns", "PartStore", "Store", "open_store"]

Columns = Mapping[str, npt.NDArray[Any]]
"""Values by name, all of one length; ``path`` is an array of bytes."""


class Store(Protocol):
    """A table of ``total`` rows that is written in parts of ``part`` rows, the last as short as it is."""

    @property
    def rows(self) -> int:
        """How many rows are on disk for good."""

    def write(self, columns: Columns) -> None:
        """Add the next part."""

    def finish(self) -> list[Path]:
        """Give the files their names, when all rows are written; returns them."""


def _parquet(columns: Columns, metadata: Mapping[str, str]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {
        name: pa.array([os.fsdecode(value) for value in values])
        if name == "path"
        else pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        if values.ndim == 2
        else pa.array(values)
        for name, values in columns.items()
    }
    table = pa.table(arrays).replace_schema_metadata(dict(metadata))
    return lambda file: parquet.write_table(table, file)


def _safetensors(columns: Columns, metadata: Mapping[str, str]) -> bytes:
    tensors = {name: torch.from_numpy(v) for name, v in columns.items() if name != "path"}
    about = {**metadata, "path": [os.fsdecode(value) for value in columns["path"]]}
    # one entry: safetensors writes several in an order that changes from file to file
    return save(tensors, {"dinovmf_plugin": json.dumps(about)})


class PartStore:
    """A file per part, whole or not there (``parquet``, ``safetensors``).

    Args:
        folder: of the files.
        total: rows of the whole table.
        part: rows of a part.
        kind: ``parquet`` or ``safetensors``.
        metadata: goes into every file.
    """

    def __init__(
        self, folder: Path, total: int, part: int, kind: str, metadata: Mapping[str, str]
    ) -> None:
        self.folder, self.total, self.part, self.kind = folder, total, part, kind
        self.metadata = metadata
        self._done = sum(1 for _ in self._whole())

    def _path(self, number: int) -> Path:
        count = -(-self.total // self.part)
        return self.folder / f"part-{number:05d}-of-{count:05d}.{self.kind}"

    def _whole(self) -> Iterator[Path]:
        """Files from the first on; what stands after a gap was not written in order."""
        number = 0
        while number * self.part < self.total and (path := self._path(number)).is_file():
            yield path
            number += 1

    @property
    def rows(self) -> int:
        """How many rows are on disk for good."""
        return min(self._done * self.part, self.total)

    def write(self, columns: Columns) -> None:
        """Add the next part."""
        content = (_parquet if self.kind == "parquet" else _safetensors)(columns, self.metadata)
        write_file(self._path(self._done), content)
        self._done += 1

    def finish(self) -> list[Path]:
        """All files."""
        return list(self._whole())


class ArrayStore:
    """A ``.npy`` file per column, which has its name when it is whole.

    ``.rows.json`` counts what is on disk for good; what a killed run wrote beyond is written again. Without
    a memory map: a disk that fills up would end the process without a word.

    Args:
        folder: of the files.
        total: rows of the whole table.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self._count = folder / ".rows.json"
        known: dict[str, Any] = {"rows": 0, "columns": []}
        if self._count.is_file():
            known = json.loads(self._count.read_text(encoding="utf-8"))
        self._rows: int = known["rows"]
        self._names: list[str] = known["columns"]

    @property
    def rows(self) -> int:
        """How many rows are on disk for good."""
        return self._rows

    def _draft(self, name: str) -> Path:
        return self.folder / f".{name}.npy.part"

    def write(self, columns: Columns) -> None:
        """Add the next part."""
        for name, values in columns.items():
            header = io.BytesIO()
            shape = (self.total, *values.shape[1:])
            about = {"descr": npy.dtype_to_descr(values.dtype), "fortran_order": False}
            npy.write_array_header_1_0(header, {**about, "shape": shape})
            start = len(header.getvalue())
            row = values.dtype.itemsize * int(np.prod(values.shape[1:], dtype=np.int64))
            try:
                with open(self._draft(name), "r+b" if self._rows else "wb") as file:
                    if self._rows == 0:
                        file.write(header.getvalue())
                    file.seek(start + self._rows * row)
                    file.write(np.ascontiguousarray(values).tobytes())
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                path = self.folder / f"{name}.npy"
                raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
        self._rows += len(columns["path"])
        self._names = list(columns)
        write_json(self._count, {"rows": self._rows, "columns": self._names})

    def finish(self) -> list[Path]:
        """Give the files their names; returns them."""
        paths = [self.folder / f"{name}.npy" for name in self._names]
        for name, path in zip(self._names, paths, strict=True):
            if self._draft(name).is_file():  # a killed run may have renamed it
                os.replace(self._draft(name), path)
        return paths


def open_store(
    kind: str, folder: Path, *, total: int, part: int, metadata: Mapping[str, str]
) -> Store:
    """Make or go on with a table.

    Args:
        kind: ``parquet``, ``safetensors`` or ``npy``.
        folder: of its files and of nothing else.
        total: rows of the whole table.
        part: rows that are written together.
        metadata: what the table was made of, as text; it goes into the files of parts.
    """
    folder.mkdir(exist_ok=True)
    for draft in folder.glob(".draft-*"):  # of a killed run
        draft.unlink()
    if kind == "npy":
        return ArrayStore(folder, total)
    return PartStore(folder, total, part, kind, metadata)
