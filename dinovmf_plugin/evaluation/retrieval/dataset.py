"""The revisited Oxford and Paris sets on disk.

::

    data_path/
      roxford5k/                    (or rparis6k/, or data_path itself is this folder)
        gnd_roxford5k.pkl           imlist, qimlist, gnd: [{bbx, easy, hard, junk}, ...]
        jpg/all_souls_000013.jpg ...

Both the first release of the images and the face-blurred one (v1.0, the only one hosted since 2022)
have this layout and these names; scores on the two differ by a few points, so say which you used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dinovmf_plugin.data.decoding import UnreadableImageError, open_image
from dinovmf_plugin.data.safe_pickle import load_plain_pickle

__all__ = ["QueryTruth", "RetrievalSet", "load_retrieval_set", "read_image"]

Box = tuple[float, float, float, float]


class QueryTruth(TypedDict):
    """What one query should find: int64 indices into the database, and its box (or None)."""

    easy: NDArray[np.int64]
    hard: NDArray[np.int64]
    junk: NDArray[np.int64]
    bbx: Box | None


@dataclass(frozen=True)
class RetrievalSet:
    """A checked retrieval set: every name has an image file, every index a name."""

    folder: Path
    truth_path: Path
    database: tuple[str, ...]
    queries: tuple[str, ...]
    ground_truth: tuple[QueryTruth, ...]

    def image_path(self, name: str) -> Path:
        """File of a database or query image."""
        return self.folder / "jpg" / f"{name}.jpg"

    def query_index(self, name: str) -> int:
        """Place of a query in the list.

        Raises:
            ValueError: if no query has this name.
        """
        if name not in self.queries:
            raise ValueError(
                f"query image {name!r} is not in the query list of {self.truth_path} (it has "
                f"{len(self.queries)}, such as {self.queries[0]!r})"
            )
        return self.queries.index(name)


def _find_folder(data_path: Path, dataset: str) -> Path:
    if not data_path.is_dir():
        raise FileNotFoundError(f"data_path={data_path} is not a folder")
    truth = f"gnd_{dataset}.pkl"
    for folder in (data_path / dataset, data_path):
        if (folder / truth).is_file():
            return folder
    raise FileNotFoundError(
        f"there is no {truth} in {data_path / dataset} or {data_path}: data_path must hold a folder "
        f"{dataset} with {truth} and jpg/ (dataset=roxford5k or rparis6k)"
    )


def _names(content: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = content.get(key)
    if isinstance(names, np.ndarray):
        names = names.ravel().tolist()
    if (
        not isinstance(names, list | tuple)
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{path}: {key} must be a list of image names")
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{path}: {key} holds {name!r}, which is not a plain image name")
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: {key} names an image twice")
    return tuple(names)


def _indices(truth: Mapping[str, Any], field: str, where: str, size: int) -> NDArray[np.int64]:
    if field not in truth:
        raise ValueError(f"{where} has no {field!r}: it must hold bbx, easy, hard and junk")
    values = np.asarray(truth[field])
    if values.size == 0:
        return np.empty(0, dtype=np.int64)
    if values.dtype.kind not in "iuf" or (values != np.floor(values)).any():
        raise ValueError(f"{where}: {field} must be whole numbers, got {values.dtype}")
    values = values.ravel()
    if values.min() < 0 or values.max() >= size:
        bad = values.max() if values.max() >= size else values.min()
        raise ValueError(f"{where}: {field} names image {int(bad)}, but imlist has {size} images")
    return values.astype(np.int64)


def _box(truth: Mapping[str, Any], where: str) -> Box | None:
    if truth.get("bbx") is None:
        return None
    try:
        box = np.asarray(truth["bbx"], dtype=np.float64).ravel()
    except (TypeError, ValueError):
        box = np.empty(0)
    if len(box) != 4 or not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(
            f"{where}: bbx is {truth['bbx']!r}, not left, top, right, bottom in pixels"
        )
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom


def _missing(found: RetrievalSet) -> str | None:
    if not (found.folder / "jpg").is_dir():
        return f"there is no folder {found.folder / 'jpg'} with the images"
    present = {path.name for path in (found.folder / "jpg").iterdir()}
    for kind, names in (("query", found.queries), ("database", found.database)):
        lacking = [name for name in names if f"{name}.jpg" not in present]
        if lacking:
            return (
                f"{kind} image {lacking[0]}.jpg is not in {found.folder / 'jpg'} "
                f"({len(lacking)} of {len(names)} {kind} images are missing)"
            )
    return None


def load_retrieval_set(data_path: str | Path, dataset: str) -> RetrievalSet:
    """Read and check a set before any long work.

    Args:
        data_path: folder that holds ``dataset/``, or that folder itself.
        dataset: ``roxford5k``, ``rparis6k`` or any set in the same layout.

    Raises:
        FileNotFoundError: if a folder, the ground truth or an image is missing.
        ValueError: if the ground truth is not of the published form, or is not safe to read.
    """
    folder = _find_folder(Path(data_path), dataset)
    path = folder / f"gnd_{dataset}.pkl"
    content = load_plain_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("gnd"), list | tuple):
        raise ValueError(f"{path}: must hold a dict with imlist, qimlist and gnd")
    database = _names(content, "imlist", path)
    queries = _names(content, "qimlist", path)
    truths: Sequence[Any] = content["gnd"]
    if len(truths) != len(queries):
        raise ValueError(f"{path}: {len(queries)} query images, but {len(truths)} entries in gnd")
    ground_truth = []
    for query, truth in enumerate(truths):
        where = f"{path}: gnd of query {query} ({queries[query]})"
        if not isinstance(truth, dict):
            raise ValueError(f"{where} is not a dict with bbx, easy, hard and junk")
        easy, hard, junk = (
            _indices(truth, field, where, len(database)) for field in ("easy", "hard", "junk")
        )
        merged = np.concatenate([easy, hard, junk])
        if len(np.unique(merged)) != len(merged):
            raise ValueError(f"{where} lists an image twice among easy, hard and junk")
        ground_truth.append(QueryTruth(easy=easy, hard=hard, junk=junk, bbx=_box(truth, where)))
    found = RetrievalSet(folder, path, database, queries, tuple(ground_truth))
    if problem := _missing(found):
        raise FileNotFoundError(problem)
    return found


def _open_rgb(path: Path) -> tuple[Image.Image, bool]:
    """The image, and whether its file ends early: the published archives hold such files."""
    try:
        return open_image(path), False
    except UnreadableImageError as error:
        if "truncated" not in str(error.__cause__):
            raise ValueError(f"{path} cannot be read as an image: {error.__cause__}") from error
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return open_image(path), True
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_image(path: Path, imsize: int | None, box: Box | None = None) -> tuple[Image.Image, bool]:
    """Open, crop to a box, shrink.

    Args:
        path: image file.
        imsize: longest side in pixels after shrinking (aspect kept, never enlarged, Lanczos); None
            leaves the size.
        box: left, top, right, bottom. The crop is shrunk by the factor that the *whole* image would
            need, so that things keep their scale, as the revisited benchmark's baselines do.

    Returns:
        The RGB image and whether its file was truncated (then the missing part is gray).

    Raises:
        ValueError: if the file is not an image, or the box lies outside it.
    """
    image, truncated = _open_rgb(path)
    longest = max(image.size)
    if box is not None:
        if box[0] >= image.width or box[1] >= image.height or box[2] <= 0 or box[3] <= 0:
            raise ValueError(f"{path}: box {box} lies outside the image of {image.size}")
        image = image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]
    if imsize is not None:
        limit = imsize if box is None else round(imsize * max(image.size) / max(longest, imsize))
        image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    return image, truncated
