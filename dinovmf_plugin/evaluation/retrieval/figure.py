"""A picture of rankings: each query and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from dinovmf_plugin.evaluation.retrieval.dataset import QueryTruth, RetrievalSet, read_image

__all__ = ["draw_rankings", "kind_of"]

_CELL = 120
_BORDER = 5
_GAP = 4
#: Frames by kind; a letter repeats the color for readers who cannot tell colors apart.
_KINDS = {
    "query": ("Q", (40, 40, 40)),
    "easy": ("E", (27, 158, 119)),
    "hard": ("H", (55, 110, 200)),
    "junk": ("J", (150, 150, 150)),
    "wrong": ("x", (200, 60, 40)),
}


def kind_of(truth: QueryTruth, index: int) -> str:
    """``easy``, ``hard``, ``junk`` or ``wrong``: what a database image is to a query.

    Example:
        >>> one = np.array([4])
        >>> kind_of(QueryTruth(easy=one, hard=one[:0], junk=one[:0], bbx=None), 4)
        'easy'
    """
    if index in truth["easy"]:
        return "easy"
    if index in truth["hard"]:
        return "hard"
    return "junk" if index in truth["junk"] else "wrong"


def _cell(path: Path, kind: str) -> Image.Image:
    letter, color = _KINDS[kind]
    image, _ = read_image(path, 2 * _CELL)
    inner = _CELL - 2 * _BORDER
    image = ImageOps.pad(image, (inner, inner), color=(255, 255, 255))
    cell = ImageOps.expand(image, _BORDER, fill=color)
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, 15, 15), fill=color)
    draw.text((4, 2), letter, fill=(255, 255, 255))
    return cell


def draw_rankings(
    data: RetrievalSet, ranks: NDArray[np.int64], queries: Sequence[int], columns: int = 10
) -> Image.Image:
    """One row per query: the query, then its first results.

    Frames: green E easy, blue H hard, gray J junk (not counted), red x wrong.

    Args:
        data: the set.
        ranks: ``(database, queries)``, best first down each column.
        queries: which queries to draw.
        columns: how many results of each.
    """
    columns = min(columns, len(ranks))
    step = _CELL + _GAP
    sheet = Image.new("RGB", ((columns + 1) * step + _GAP, len(queries) * step + _GAP), "white")
    for row, query in enumerate(queries):
        cells = [(data.queries[query], "query")] + [
            (data.database[index], kind_of(data.ground_truth[query], index))
            for index in ranks[:columns, query].tolist()
        ]
        for column, (name, kind) in enumerate(cells):
            sheet.paste(
                _cell(data.image_path(name), kind), (_GAP + column * step, _GAP + row * step)
            )
    return sheet
