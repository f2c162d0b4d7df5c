"""Each data set in torchvision's own layout, with a handful of tiny images."""

import pickle

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from dinovmf_plugin.evaluation.logistic.datasets import (
    caltech101_train_rows,
    load_transfer_dataset,
)
from dinovmf_plugin.evaluation.logistic.task import transfer_averages
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.report.paper import TABLE_5


def _picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (value % 256, 0, 0)).save(path)


def _lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    _lines(data / "variants.txt", ["707", "A300"])
    for split, ids in (("trainval", ["001", "002", "003"]), ("test", ["004"])):
        _lines(
            data / f"images_variant_{split}.txt",
            [f"{i} {'A300' if i > '002' else '707'}" for i in ids],
        )
        for i in ids:
            _picture(data / "images" / f"{i}.jpg", int(i))
    return [0, 0, 1], [1]


def _cifar(root, name, folder, batches, key):
    for file, labels in batches.items():
        (root / folder).mkdir(exist_ok=True)
        pixels = np.zeros((len(labels), 3072), dtype=np.uint8)
        with open(root / folder / file, "wb") as handle:
            pickle.dump({"data": pixels, key: labels}, handle)
    meta = "batches.meta" if name == "cifar10" else "meta"
    names = "label_names" if name == "cifar10" else "fine_label_names"
    with open(root / folder / meta, "wb") as handle:
        pickle.dump({names: ["a", "b", "c"]}, handle)


def _cifar10(root):
    batches = {f"data_batch_{i}": [0, 1] for i in range(1, 6)} | {"test_batch": [2]}
    _cifar(root, "cifar10", "cifar-10-batches-py", batches, "labels")
    return [0, 1] * 5, [2]


def _cifar100(root):
    _cifar(root, "cifar100", "cifar-100-python", {"train": [2, 0], "test": [1]}, "fine_labels")
    return [2, 0], [1]


def _dtd(root):
    base = root / "dtd" / "dtd"
    for split, names in (
        ("train", ["banded/b1.jpg", "dotted/d1.jpg"]),
        ("val", ["banded/b3.jpg", "dotted/d2.jpg"]),
        ("test", ["banded/b2.jpg", "dotted/d3.jpg"]),
    ):
        _lines(base / "labels" / f"{split}1.txt", names)
        for name in names:
            _picture(base / "images" / name, 1)
    return [0, 1, 0, 1], [0, 1]


def _flowers102(root):
    base = root / "flowers-102"
    for i in range(1, 7):
        _picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 2, 1, 2, 1]])})
    ids = {"trnid": np.array([[1, 5]]), "valid": np.array([[3, 6]]), "tstid": np.array([[2, 4]])}
    scipy.io.savemat(base / "setid.mat", ids)
    return [0, 1, 1, 0], [1, 0]


def _food101(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, names in (("train", ["pie/1", "soup/2"]), ("test", ["soup/3"])):
        listing = {c: [n for n in names if n.startswith(c)] for c in ("pie", "soup")}
        text = str(listing).replace("'", '"')
        (base / "meta" / f"{split}.json").write_text(text)
        for name in names:
            _picture(base / "images" / f"{name}.jpg", 1)
    return [0, 1], [1]


def _pets(root):
    base = root / "oxford-iiit-pet"
    _lines(base / "annotations" / "trainval.txt", ["cat_1 1 1 1", "dog_1 2 2 1", "dog_2 2 2 1"])
    _lines(base / "annotations" / "test.txt", ["cat_2 1 1 1"])
    for name in ("cat_1", "dog_1", "dog_2", "cat_2"):
        _picture(base / "images" / f"{name}.jpg", 1)
    return [0, 1, 1], [0]


def _sun397(root):
    base = root / "SUN397"
    names = ["a/abbey/sun_a.jpg", "a/airport/sun_b.jpg", "a/airport/sun_c.jpg", "a/abbey/sun_d.jpg"]
    for name in names:
        _picture(base / name, 1)
    _lines(base / "ClassName.txt", ["/a/abbey", "/a/airport"])
    _lines(base / "Training_01.txt", [f"/{names[1]}", f"/{names[0]}"])
    _lines(base / "Testing_01.txt", [f"/{names[2]}"])
    return [1, 0], [1]


def _caltech101(root):
    base = root / "caltech101" / "101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 40), ("Faces", 35)):
        for i in range(1, count + 1):
            _picture(base / name / f"image_{i:04d}.jpg", i)
    first, second = caltech101_train_rows([40, 35])
    return [0] * len(first) + [1] * len(second), [0] * (40 - len(first)) + [1] * (35 - len(second))


MAKERS = {
    "aircraft": _aircraft,
    "caltech101": _caltech101,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "dtd": _dtd,
    "flowers102": _flowers102,
    "food101": _food101,
    "pets": _pets,
    "sun397": _sun397,
}


@pytest.fixture
def no_checksums(monkeypatch):
    for cls in (datasets.CIFAR10, datasets.CIFAR100, datasets.Flowers102):
        monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)


@pytest.mark.parametrize("name", TABLE_5)
def test_every_set_of_table_5(tmp_path, no_checksums, monkeypatch, name):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)
    train_labels, test_labels = MAKERS[name](tmp_path)
    train, test = load_transfer_dataset(name, tmp_path)
    assert train.labels.tolist() == train_labels
    assert test.labels.tolist() == test_labels
    assert train.digest != test.digest
    for images in (train, test):
        for i in range(len(images)):
            assert images.source.image(i).mode == "RGB"
            assert images.source.label(i) == images.labels[i]


@pytest.mark.parametrize("name", TABLE_5)
def test_a_missing_set_says_where_it_should_be(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is not at .*where torchvision puts it"):
        load_transfer_dataset(name, tmp_path)


def test_an_incomplete_set(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match="cifar10 .* is incomplete"):
        load_transfer_dataset("cifar10", tmp_path)
    _sun397(tmp_path)
    (tmp_path / "SUN397" / "Testing_01.txt").unlink()
    with pytest.raises(FileNotFoundError, match="official partition .*Testing_01"):
        load_transfer_dataset("sun397", tmp_path)
    _lines(tmp_path / "SUN397" / "Testing_01.txt", ["/a/abbey/sun_none.jpg"])
    with pytest.raises(ValueError, match="names a/abbey/sun_none.jpg, which is not there"):
        load_transfer_dataset("sun397", tmp_path)


def test_the_published_caltech_split():
    """Class sizes and a few rows of Ericsson et al.'s published lists."""
    sizes = [467, 435, 435, 200, 798, 55, 800, 42]
    rows = caltech101_train_rows(sizes)
    assert [r + 1 for r in rows[0]][:8] == [10, 26, 40, 48, 71, 73, 88, 89]
    assert [r + 1 for r in rows[1]][-5:] == [339, 371, 399, 424, 432]
    assert [r + 1 for r in rows[3]][:6] == [1, 7, 24, 37, 48, 49]
    assert [r + 1 for r in rows[6]][-3:] == [750, 764, 783]
    assert [len(r) for r in rows[:3]] == [28, 27, 29]


def test_any_folder_and_the_table(compose, run_overrides, make_folder, tmp_path):
    root = tmp_path / "sets"
    for name, seed in (("shapes", 0), ("others", 5)):
        (root / name).mkdir(parents=True)
        make_folder(6, seed=seed).rename(root / name / "train")
        make_folder(3, seed=seed + 1).rename(root / name / "test")
    small = [f"transfer.root={root}", "transfer.datasets=[shapes,others]", "transfer.num_values=3"]
    small += ["transfer.resize=24", "transfer.crop_size=24"]
    result = evaluate_one(compose("transfer", *run_overrides, *small), "transfer")
    found = result["datasets"]
    assert list(found) == ["shapes", "others"]
    assert result["average"]["top1"] == pytest.approx(
        (found["shapes"]["top1"] + found["others"]["top1"]) / 2
    )
    assert len(found["shapes"]["cv"]["weight_decay"]) == 3
    page = (tmp_path / "out" / "transfer.html").read_text()
    assert "<th>shapes</th>" in page
    with pytest.raises(FileNotFoundError, match="is no folder with train and test"):
        load_transfer_dataset("nothing", root)


def test_average_by_the_metric_of_each_set():
    results = {
        "aircraft": {"top1": 10.0, "mean_per_class": 20.0},
        "dtd": {"top1": 30.0, "mean_per_class": 70.0},
    }
    assert transfer_averages(results) == {
        "top1": 20.0,
        "mean_per_class": 45.0,
        "protocol_metric": 25.0,
    }
