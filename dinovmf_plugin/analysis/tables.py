"""Columns of equal length, saved as CSV or Parquet."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin.runs.files import name_not_utf8, write_file

__all__ = ["TABLE_FORMATS", "check_table_format", "check_utf8", "save_table"]

TABLE_FORMATS = ("csv", "parquet")


def check_table_format(name: str) -> None:
    """Refuse an unknown format, or Parquet without pyarrow, before any long work.

    Raises:
        ValueError: for an unknown format.
        ImportError: if pyarrow is needed and missing.
    """
    if name not in TABLE_FORMATS:
        raise ValueError(f"table={name!r} is unknown: choose one of {', '.join(TABLE_FORMATS)}")
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "table=parquet needs pyarrow: pip install 'dinovmf-plugin[analysis]', or use table=csv"
        )


def check_utf8(paths: Iterable[str | Path]) -> None:
    """Refuse names that Parquet cannot hold, before any computing.

    Raises:
        ValueError: naming the first file whose name is no UTF-8.
    """
    shown = name_not_utf8(paths)
    if shown is not None:
        raise ValueError(
            f"table=parquet cannot hold the file name {shown}, which is no UTF-8: use table=csv, which "
            "keeps its bytes, or rename the file"
        )


def save_table(columns: Mapping[str, Sequence[Any]], folder: Path, name: str, kind: str) -> Path:
    """Write ``folder/name.csv`` or ``.parquet`` atomically.

    Args:
        columns: values by column name, Python scalars or strings, all of one length.
        folder: existing folder.
        name: file name without suffix.
        kind: one of ``TABLE_FORMATS``.

    Returns:
        The path.

    Raises:
        ValueError: if the columns differ in length or the format is unknown.
    """
    check_table_format(kind)
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of {name} differ in length: {lengths}")
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        # file names may hold bytes that are no UTF-8; they come back as they were
        content = text.getvalue().encode("utf-8", "surrogateescape")
        write_file(path, content)
        return path
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({key: list(values) for key, values in columns.items()})
    write_file(path, lambda file: parquet.write_table(table, file))
    return path
