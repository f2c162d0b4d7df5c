"""Which images a few-shot classifier may learn from: MSN's published lists, or draws by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["draw_fraction", "draw_per_class", "draw_splits", "match_listed", "msn_split_files"]

Rows = NDArray[np.int64]


def draw_per_class(labels: ArrayLike, counts: Sequence[int], seed: int) -> dict[int, Rows]:
    """For every count that many rows per class; a smaller set is part of a larger one, as in MSN.

    Raises:
        ValueError: if a class has fewer images than a count.

    Example:
        >>> rows = draw_per_class([0, 0, 1, 1, 1], [1, 2], seed=0)
        >>> len(rows[1]), len(rows[2]), set(rows[1]) <= set(rows[2])
        (2, 4, True)
    """
    y = np.asarray(labels)
    classes, sizes = np.unique(y, return_counts=True)
    if max(counts) > sizes.min():
        raise ValueError(
            f"{max(counts)} images per class were asked for, but class {classes[sizes.argmin()]} has "
            f"only {sizes.min()}"
        )
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(y == label)) for label in classes]
    return {n: np.sort(np.concatenate([rows[:n] for rows in shuffled])) for n in counts}


def draw_fraction(labels: ArrayLike, fraction: float, seed: int) -> Rows:
    """A share of the rows, spread over the classes by their sizes, at least one of each.

    ImageNet's 1 % lists 12 or 13 images per class; so does this.

    Raises:
        ValueError: if ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1")
    y = np.asarray(labels)
    classes, sizes = np.unique(y, return_counts=True)
    wanted = sizes * fraction
    take = np.maximum(1, np.floor(wanted).astype(np.int64))
    rest = max(0, round(len(y) * fraction) - int(take.sum()))
    rng = np.random.default_rng(seed)
    # the largest remainders get one more each; ties are broken by chance, not by class order
    order = np.lexsort((rng.random(len(classes)), -(wanted - take)))
    take[order[:rest]] += 1
    rows = [
        rng.permutation(np.flatnonzero(y == label))[:n]
        for label, n in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def draw_splits(
    labels: ArrayLike, counts: Sequence[int], fraction: float | None, num_splits: int, seed: int
) -> dict[str, list[Rows]]:
    """All settings of the protocol by chance: ``num_splits`` per count, one for the fraction."""
    splits: dict[str, list[Rows]] = {f"{n} per class": [] for n in counts}
    if counts:
        for split in range(num_splits):
            drawn = draw_per_class(labels, counts, seed + split)
            for n, rows in drawn.items():
                splits[f"{n} per class"].append(rows)
    if fraction is not None:
        splits[f"{100 * fraction:g} %"] = [draw_fraction(labels, fraction, seed)]
    return splits


def _entries(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _per_class(entries: Sequence[str]) -> float:
    return len(entries) / max(1, len({name.split("_")[0] for name in entries}))


def msn_split_files(
    folder: str | Path, counts: Sequence[int], fraction: float | None, num_splits: int
) -> dict[str, list[Path]]:
    """MSN's lists ``imagenet_subsets{1,2,3}/{1,2,5}imgs_class.txt`` and ``1percent.txt`` in ``folder``.

    ``imagenet_subsets3`` calls its list of 5 images per class ``3imgs_class.txt``: a missing list is
    looked for under any name in its folder, by the number of lines per class.

    Args:
        folder: holds the folders of lists.
        counts: images per class.
        fraction: 0.01, or None to leave ``1percent.txt`` out.
        num_splits: lists per count, from as many folders.

    Raises:
        FileNotFoundError: if a folder or a list is missing.
        ValueError: if ``fraction`` is another share.
    """
    if fraction not in (None, 0.01):
        raise ValueError(
            f"few_shot.fraction={fraction} has no list in few_shot.split_dir: use 0.01 (1percent.txt), "
            "or null to leave it out"
        )
    root = Path(folder)
    subsets = sorted(path for path in root.glob("imagenet_subsets*") if path.is_dir())
    if not subsets:
        raise FileNotFoundError(
            f"few_shot.split_dir={folder} holds no folder imagenet_subsets1, 2, 3"
        )
    if counts and num_splits > len(subsets):
        raise FileNotFoundError(
            f"few_shot.num_splits={num_splits} exceeds the folders imagenet_subsets1, 2, 3 in "
            f"few_shot.split_dir={folder}: use at most {len(subsets)}"
        )
    files: dict[str, list[Path]] = {}
    for n in counts:
        of_count = []
        for subset in subsets[:num_splits]:
            path = subset / f"{n}imgs_class.txt"
            if not path.is_file():
                others = sorted(subset.glob("*imgs_class.txt"))
                same = [p for p in others if _per_class(_entries(p)) == n]
                if not same:
                    raise FileNotFoundError(f"{subset} has no list of {n} images per class")
                path = same[0]
            of_count.append(path)
        files[f"{n} per class"] = of_count
    if fraction is not None:
        files["1 %"] = [p / "1percent.txt" for p in subsets if (p / "1percent.txt").is_file()]
        if not files["1 %"]:
            raise FileNotFoundError(
                f"few_shot.split_dir={folder} holds no imagenet_subsets1/1percent.txt: set "
                "few_shot.fraction=null to leave it out"
            )
    return files


def match_listed(
    split_files: Mapping[str, Sequence[Path]], files: Sequence[str]
) -> dict[str, list[Rows]]:
    """Rows of ``files`` that every list names, by file name (ImageNet's are unique).

    Raises:
        ValueError: if a list names an image that is not there, with the first such name.
    """
    row_of = {Path(path).name: row for row, path in enumerate(files)}
    splits: dict[str, list[Rows]] = {}
    for setting, paths in split_files.items():
        splits[setting] = []
        for path in paths:
            names = [Path(entry).name for entry in _entries(path)]
            absent = [name for name in names if name not in row_of]
            if absent:
                raise ValueError(
                    f"{path} names {len(absent)} images that data.train_path lacks, such as {absent[0]}"
                )
            splits[setting].append(np.sort(np.array([row_of[name] for name in names])))
    return splits
