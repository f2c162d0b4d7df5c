"""A folder of images to a table on disk, in memory that does not grow with the folder."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dinovmf_plugin.data.loaders import errors_in_one_sentence
from dinovmf_plugin.data.source import Listing
from dinovmf_plugin.embeddings.scores import Embedder, Scored
from dinovmf_plugin.embeddings.settings import EmbedSettings
from dinovmf_plugin.embeddings.stores import Columns, Store, open_store
from dinovmf_plugin.features.images import (
    ImageSet,
    describe,
    image_folder,
    loader_for,
)
from dinovmf_plugin.runs.environment import versions
from dinovmf_plugin.runs.files import name_not_utf8, write_json
from dinovmf_plugin.runs.folder import open_run_folder
from dinovmf_plugin.runs.lock import RunLock

__all__ = ["embed_folder"]

_RECORD = "embeddings.json"


def _list(settings: EmbedSettings) -> ImageSet:
    images = image_folder(
        settings.data.path,
        "data.path",
        labeled=False,
        check_images=settings.data.check_images,
        skip_unreadable=settings.data.skip_unreadable,
        keys=settings.data,
    )
    paths = (images.path(index) for index in range(len(images)))
    shown = name_not_utf8(paths) if settings.format == "parquet" else None
    if shown is not None:
        raise ValueError(
            f"format=parquet cannot hold the file name {shown}, which is no UTF-8: use format=npy or "
            "format=safetensors, which keep its bytes, or rename the file"
        )
    return images


def _columns(batches: list[Scored], images: ImageSet, start: int) -> Columns:
    assert isinstance(images.source, Listing)
    columns = {"features": np.concatenate([batch.features.numpy() for batch in batches])}
    scores = [batch.scores for batch in batches if batch.scores is not None]
    if scores:
        for name in ("component", "responsibility", "log_likelihood"):
            columns[name] = np.concatenate([getattr(part, name).numpy() for part in scores])
    stop = start + len(columns["features"])
    return {**columns, "path": images.source.names[start:stop]}


def _name_of(images: ImageSet, start: int, row: int) -> str:
    return images.describe_image(start + row)


def _fill(settings: EmbedSettings, embedder: Embedder, images: ImageSet, store: Store) -> None:
    """Write the rows that are missing; one part at a time is held."""
    left = images.subset(range(store.rows, len(images))) if store.rows else images
    loader = loader_for(
        left,
        embedder.transform,
        batch_size=settings.data.batch_size,
        num_workers=settings.data.num_workers,
        data_format=settings.data.format,
        device=embedder.network.device,
    )
    held: list[Scored] = []
    rows = store.rows
    with tqdm(
        total=len(images),
        initial=rows,
        desc=f"embedding {Path(settings.data.path).name}",
        unit="img",
        disable=not settings.progress,
    ) as bar:
        for pixels, _ in loader:
            name_of = partial(_name_of, images, rows)
            held.append(embedder.score(pixels, name_of))
            rows += len(pixels)
            bar.update(len(pixels))
            if rows - store.rows == settings.part or rows == len(images):
                store.write(_columns(held, images, store.rows))
                held.clear()


def embed_folder(settings: EmbedSettings) -> dict[str, Any]:
    """Write a row per image of ``settings.data.path`` into ``settings.output_dir/table``.

    Columns are ``features`` (D numbers, float32), with a mixture ``component`` (int64),
    ``responsibility`` (float32) and ``log_likelihood`` (float64), and ``path``, relative to the folder. A
    stopped run goes on with its first missing part; what comes out is what an uninterrupted run writes. The
    folder is bound to the network, the images (names, sizes, times of change) and the settings.

    Returns:
        What ``embeddings.json`` holds.

    Raises:
        FileNotFoundError: if the checkpoint or the folder is missing.
        ValueError: if a setting, the checkpoint, an image or the output folder cannot be used.
        RunInUseError: if another process writes there.
    """
    images = _list(settings)
    embedder = Embedder.load(settings, settings.data)
    network = embedder.network
    made_of = {
        "network": network.identity,
        "images": images.digest,
        "transform": describe(embedder.transform, settings.data.format),
    }
    folder = open_run_folder(settings.output_dir, {**settings.identity(), **made_of})
    lock = RunLock(folder, "written", "choose another output_dir for other settings")
    lock.acquire()
    try:
        record = folder / _RECORD
        if record.is_file():
            print(f"{record} tells of a finished run: nothing is left to do")
            finished: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return finished
        started = time.monotonic()
        store = open_store(
            settings.format,
            folder / "table",
            total=len(images),
            part=settings.part,
            metadata={"format": "dinovmf_plugin embeddings 1", **made_of},
        )
        before = store.rows
        with errors_in_one_sentence():
            _fill(settings, embedder, images, store)
        files = store.finish()
        result = {
            "rows": len(images),
            "files": [str(path.relative_to(folder)) for path in files],
            "folder": str(Path(settings.data.path).resolve()),
            "checkpoint": network.record,
            **made_of,
            "settings": {**settings.identity(), "device": str(network.device)},
            "versions": versions(),
            "rows_of_this_start": len(images) - before,
            "seconds_of_this_start": round(time.monotonic() - started, 2),
        }
        write_json(record, result)
        return result
    finally:
        lock.release()
