"""MNIST-like files as an image folder: ``python -m dinovmf_plugin.data.idx SOURCE OUTPUT``.

SOURCE holds ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, packed with gzip or not, as MNIST,
Fashion-MNIST and their kin are published (Fashion-MNIST: Debian's package ``dataset-fashion-mnist``, or
the folder ``FashionMNIST/raw`` of torchvision). OUTPUT gets ``train/`` and ``val/`` with one folder
per class and one PNG per image; ``--train N`` and ``--val N`` take the first N images only. Nothing is
downloaded here.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from tqdm import tqdm

__all__ = ["build", "read_idx"]

_PARTS = {"train": "train", "t10k": "val"}


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes; one that ends in ``.gz`` is unpacked.

    Args:
        path: the file.

    Returns:
        uint8 array of the shape in the file's header.

    Raises:
        ValueError: the file is no idx file of unsigned bytes, or is cut off; the message names it.
    """
    try:
        if path.suffix != ".gz":
            values = read_sn3_pascalvincent_tensor(str(path))
        else:
            with gzip.open(path) as packed, tempfile.NamedTemporaryFile() as unpacked:
                shutil.copyfileobj(packed, unpacked)
                unpacked.flush()
                values = read_sn3_pascalvincent_tensor(unpacked.name)
    except gzip.BadGzipFile as error:
        raise ValueError(f"{str(path)!r} is no gzip file: {error}") from error
    except (AssertionError, EOFError, KeyError, RuntimeError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} is no idx file of unsigned bytes, or is cut off"
        ) from error
    if values.dtype != torch.uint8:
        raise ValueError(f"{str(path)!r} is no idx file of unsigned bytes but of {values.dtype}")
    return np.asarray(values.numpy())


def _find(source: Path, name: str) -> Path:
    for path in (source / f"{name}.gz", source / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{str(source)!r} has no file {name} or {name}.gz")


def build(
    source: str | Path,
    output: str | Path,
    *,
    train: int | None = None,
    val: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the images of idx files as class folders of PNG files.

    Args:
        source: folder with the four files.
        output: folder to create; must not exist.
        train: take the first so many training images; None takes all.
        val: the same of the held-out ones.
        progress: whether to show a progress bar.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: one of the four files is missing.
        ValueError: a file is damaged, images and labels do not fit together, or there are fewer images than
            ``train`` or ``val`` asks for.
        FileExistsError: ``output`` exists.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists: choose another folder or remove it")
    parts = {}
    for part, folder in _PARTS.items():
        images = read_idx(_find(source, f"{part}-images-idx3-ubyte"))
        labels = read_idx(_find(source, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"the {part} files do not fit together: images {images.shape}, labels {labels.shape}"
            )
        wanted = {"train": train, "val": val}[folder]
        if wanted is not None and not 1 <= wanted <= len(labels):
            raise ValueError(
                f"{folder}={wanted} must lie between 1 and {len(labels)}, all there are"
            )
        parts[folder] = (images[:wanted], labels[:wanted])
    # written beside and renamed at the end: what is interrupted is never taken for whole
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    total = sum(len(labels) for _, labels in parts.values())
    with tqdm(total=total, desc="writing images", unit="image", disable=not progress) as bar:
        for folder, (images, labels) in parts.items():
            for label in np.unique(labels):
                (partial / folder / f"{label:02d}").mkdir(parents=True)
            for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(pixels).save(partial / folder / f"{label:02d}" / f"{index:06d}.png")
                bar.update()
    partial.rename(output)
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of :func:`build`."""
    parser = argparse.ArgumentParser(prog="python -m dinovmf_plugin.data.idx", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with the four idx files")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--train", type=int, metavar="N", help="the first N training images only")
    parser.add_argument("--val", type=int, metavar="N", help="the first N held-out images only")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.source, arguments.output, train=arguments.train, val=arguments.val)
    except (ValueError, OSError) as error:
        sys.exit(f"idx: {error}")


if __name__ == "__main__":
    main()
