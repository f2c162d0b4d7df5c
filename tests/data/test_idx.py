"""MNIST-like files become class folders of the same pixels."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.data.idx import build, main, read_idx


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count, ending in (("train", 6, ".gz"), ("t10k", 3, "")):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", rng.integers(0, 256, (count, 5, 4)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", np.arange(count) % 3)
    return folder


def test_build__same_pixels_in_class_folders(source: Path, tmp_path: Path) -> None:
    out = build(source, tmp_path / "out", progress=False)
    images = read_idx(source / "train-images-idx3-ubyte.gz")
    files = sorted((out / "train").rglob("*.png"), key=lambda path: path.name)
    assert [path.parent.name for path in files] == ["00", "01", "02", "00", "01", "02"]
    for pixels, path in zip(images, files, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert len(list((out / "val").rglob("*.png"))) == 3


def test_build__never_overwrites(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="raw"):
        build(source, source)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"x", "no idx file"),
        (lambda data: data[:7], "cut off"),
        (lambda data: b"", "cut off"),
        (lambda data: b"JFIF" + data, "no idx file"),
        (lambda data: b"\0\0\x09" + data[3:], "no idx file of unsigned bytes but of torch.int8"),
    ],
)
def test_damaged_file__is_named(source: Path, tmp_path: Path, damage, words: str) -> None:
    path = source / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match=f"t10k-images-idx3-ubyte.*{words}"):
        main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"x" + data, lambda _: b""]
)
def test_damaged_gzip__is_named(source: Path, damage) -> None:
    path = source / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz' is no"):
        read_idx(path)


def test_missing_and_unfitting_files__are_named(source: Path, tmp_path: Path) -> None:
    write_idx(source / "t10k-labels-idx1-ubyte", np.zeros(4))
    with pytest.raises(ValueError, match="t10k files do not fit"):
        build(source, tmp_path / "out")
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        build(source, tmp_path / "out")


def test_build__first_images_only(source: Path, tmp_path: Path) -> None:
    main([str(source), str(tmp_path / "out"), "--train", "4", "--val", "2"])
    for part, count in (("train", 4), ("val", 2)):
        names = {path.stem for path in (tmp_path / "out" / part).rglob("*.png")}
        assert names == {f"{index:06d}" for index in range(count)}


@pytest.mark.parametrize(("key", "value"), [("train", 0), ("train", 7), ("val", -1), ("val", 4)])
def test_build__more_images_than_there_are(source: Path, tmp_path: Path, key, value) -> None:
    with pytest.raises(ValueError, match=f"{key}={value} must lie between 1 and"):
        build(source, tmp_path / "out", **{key: value}, progress=False)
    assert not (tmp_path / "out").exists()
