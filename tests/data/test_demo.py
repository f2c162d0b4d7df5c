import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.data import demo, photographs
from dinovmf_plugin.data.folders import list_images


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 40 gray squares in a package that is certainly installed."""
    labels = ["bright" if n % 4 == 0 else "dark" for n in range(40)]
    pictures = demo.Pictures(
        labels,
        [f"{n:02d}" for n in range(40)],
        lambda n: Image.new("L", (60, 40), 200 if n % 4 == 0 else 50),
    )
    fake = demo.DemoDataset("numpy", "none", "gray squares", lambda: pictures)
    monkeypatch.setitem(demo.DATASETS, "squares", fake)


@pytest.mark.usefixtures("pretend")
def test_build__class_folders_with_a_stratified_split(tmp_path: Path) -> None:
    root = demo.build(tmp_path / "d", "squares", progress=False)
    train, val = list_images(root / "train"), list_images(root / "val")
    assert train.classes == val.classes == ("bright", "dark")
    assert [np.bincount(part.labels).tolist() for part in (train, val)] == [[8, 22], [2, 8]]
    names = [Path(part.path(i)).name for part in (train, val) for i in range(len(part))]
    assert len(set(names)) == 40
    for part in (train, val):
        for index in range(len(part)):
            level = np.asarray(Image.open(part.path(index))).mean()
            assert (level > 100) == (part.classes[part.labels[index]] == "bright")
    about = json.loads((root / "about.json").read_text())
    assert about["package"] == f"numpy {metadata.version('numpy')}"


@pytest.mark.usefixtures("pretend")
def test_build__size_fraction_and_seed(tmp_path: Path) -> None:
    small = demo.build(tmp_path / "a", "squares", size=20, fraction=0.5, progress=False)
    images = list_images(small / "train")
    assert len(images) + len(list_images(small / "val")) == 20
    assert Image.open(images.path(0)).size == (30, 20)
    other = demo.build(tmp_path / "b", "squares", seed=1, progress=False)
    again = demo.build(tmp_path / "c", "squares", seed=1, progress=False)
    first = demo.build(tmp_path / "d", "squares", progress=False)
    names = [list_images(root / "val").names.tolist() for root in (other, again, first)]
    assert names[0] == names[1] != names[2]


@pytest.mark.usefixtures("pretend")
def test_build__never_overwrites(tmp_path: Path) -> None:
    root = demo.build(tmp_path / "d", "squares", progress=False)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    demo.build(root, "squares", progress=False)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")} == before
    with pytest.raises(FileExistsError, match="already holds another data set"):
        demo.build(root, "squares", seed=3, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="already holds other files: choose another folder"):
        demo.build(tmp_path / "mine", "squares", progress=False)


def test_build__bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be one of .*'elpv'.*, got 'imagenet'"):
        demo.build(tmp_path / "d", "imagenet")
    with pytest.raises(ValueError, match="val_fraction must be between 0 and 1"):
        demo.build(tmp_path / "d", val_fraction=1.0)
    absent = demo.DemoDataset(
        "no-such-package-here", "none", "nothing", lambda: pytest.fail("read")
    )
    monkeypatch.setitem(demo.DATASETS, "absent", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package-here"):
        demo.build(tmp_path / "d", "absent")


@pytest.mark.usefixtures("pretend")
def test_main(tmp_path: Path, capsys: Any) -> None:
    demo.main(["--output", str(tmp_path / "d"), "--dataset", "squares"])
    output = capsys.readouterr().out
    assert "License: none." in output
    assert "bright" in output
    with pytest.raises(SystemExit, match="demo data: .* already holds another data set"):
        demo.main(["--output", str(tmp_path / "d"), "--dataset", "squares", "--seed", "9"])


@pytest.mark.skipif(importlib.util.find_spec("animal_mnist") is None, reason="needs animal-mnist")
def test_animal_mnist(tmp_path: Path) -> None:
    root = demo.build(tmp_path / "animals", "animal-mnist", fraction=0.01, progress=False)
    images = list_images(root / "train")
    assert len(images.classes) == 10
    assert np.bincount(images.labels).tolist() == [8] * 10
    assert Image.open(images.path(0)).size == (28, 28)


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")
def test_elpv(tmp_path: Path) -> None:
    root = demo.build(tmp_path / "cells", fraction=0.01, progress=False)
    images = list_images(root / "train")
    assert images.classes == ("mono_defective", "mono_good", "poly_defective", "poly_good")
    assert Image.open(images.path(0)).size == (300, 300)


@pytest.mark.skipif(
    importlib.util.find_spec("mvtbdata") is None or importlib.util.find_spec("skimage") is None,
    reason="needs mvtb-data and scikit-image",
)
def test_photographs(tmp_path: Path) -> None:
    root = demo.build(tmp_path / "photos", "photographs", fraction=0.1, progress=False)
    train, val = list_images(root / "train"), list_images(root / "val")
    assert train.classes == val.classes
    assert len(train.classes) == 43
    assert np.bincount(train.labels).tolist() == [14] * 43
    assert np.bincount(val.labels).tolist() == [3] * 43
    patch = Image.open(train.path(0))
    assert (patch.size, patch.mode, patch.format) == ((40, 40), "RGB", "PNG")
    with pytest.raises(ValueError, match="val_fraction=0.5 is not for 'photographs'"):
        demo.build(tmp_path / "other", "photographs", val_fraction=0.5, progress=False)


def test_patches__show_the_photograph_and_halves_share_no_pixel(tmp_path: Path) -> None:
    files = []
    for number, shape in enumerate([(200, 300), (400, 480)]):
        column = np.linspace(0, 250, shape[1])[None].repeat(shape[0], 0)
        pixels = np.stack([column, np.full(shape, 100 * number), 0 * column], -1).astype(np.uint8)
        files.append(tmp_path / f"photo{number}.png")
        Image.fromarray(pixels).save(files[-1])
    labels, names, held_out, load = photographs.read_patches(files)
    assert len(set(names)) == len(names) == 2 * 175
    for index in range(0, len(names), 7):
        patch = np.asarray(load(index))
        assert patch.shape == (40, 40, 3)
        assert abs(patch[..., 1].mean() - 100 * (labels[index] == "photo1")) < 2
        # the red channel tells the column: left half below 125, right half above
        edge = patch[..., 0].min() if held_out[index] else patch[..., 0].max()
        assert (edge >= 124) if held_out[index] else (edge <= 126)
