"""Class names and indices from what a data set stores as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinovmf_plugin.data.source import NO_LABEL

__all__ = ["NoLabelsError", "index_labels"]


class NoLabelsError(ValueError):
    """Labels are wanted of images that have none."""


def index_labels(
    values: Sequence[Any], where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Class indices and names.

    Args:
        values: one per image: class numbers (their names are the numbers), names (sorted), or None or a
            negative number where an image has none.
        where: the data set, for messages.

    Returns:
        ``(N,)`` int64 indices, -1 without a label, and the names; no names if no image has a label.

    Raises:
        ValueError: a value is neither a whole number nor text.

    Example:
        >>> index_labels(["dog", "cat", None], "photos.tar")
        (array([ 1,  0, -1]), ('cat', 'dog'))
        >>> index_labels([2, 0], "photos.tar")
        (array([2, 0]), ('0', '1', '2'))
    """
    known = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in known):
        names = tuple(sorted(set(known)))
        position: dict[Any, int] = {name: i for i, name in enumerate(names)}
        indices = [NO_LABEL if value is None else position[value] for value in values]
        return np.array(indices, dtype=np.int64), names
    for value in known:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(
                f"{where}: the label {value!r} is neither a class number nor a class name"
            )
    numbers = [NO_LABEL if value is None else max(int(value), NO_LABEL) for value in values]
    return np.array(numbers, dtype=np.int64), tuple(map(str, range(max(numbers, default=-1) + 1)))
