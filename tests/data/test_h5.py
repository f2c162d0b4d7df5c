"""``data.format=h5``: the same images, labels and crops as the folder that the file was made of."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.module import pretrain_loader, validation_loader
from dinovmf_plugin.data.sources.h5 import list_h5

h5py = pytest.importorskip("h5py")


def write_h5(root: Path, file: Path) -> Path:
    """As solo-learn's script does: a group per class, the bytes of every image file in it."""
    with h5py.File(file, "w") as h5:
        for folder in root.iterdir():
            group = h5.create_group(folder.name)
            for image in folder.iterdir():
                data = np.frombuffer(image.read_bytes(), dtype="uint8")
                group.create_dataset(image.name, data=data, compression="gzip")
    return file


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> dict[str, Path]:
    """``train`` of classes a, b, c and ``val`` of b, c; each as a folder and as a file."""
    root = tmp_path_factory.mktemp("h5")
    for split, classes in (("train", "cab"), ("val", "bc")):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for i in range(3):
                picture(i + ord(label), 40, 48).save(root / split / label / f"{i}.jpg")
        write_h5(root / split, root / f"{split}.h5")
    return {name: root / name for name in ("train", "val", "train.h5", "val.h5")}


def _cfg(data_cfg: Any, paths: dict[str, Path], ending: str, **overrides: Any) -> Any:
    return data_cfg(
        data__format="h5" if ending else "image_folder",
        data__train_path=str(paths[f"train{ending}"]),
        data__val_path=str(paths[f"val{ending}"]),
        optimizer__batch_size=3,
        **overrides,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches__those_of_the_folder(data_cfg, paths, num_workers):
    workers = {"data__num_workers": num_workers}
    loader = pretrain_loader(_cfg(data_cfg, paths, ".h5", **workers))
    expected = pretrain_loader(_cfg(data_cfg, paths, ""))
    batches = list(zip(loader, expected, strict=True))
    assert len(batches) == 3
    for (index, crops, label), (index_, crops_, label_) in batches:
        assert torch.equal(index, index_)
        assert torch.equal(label, label_)
        assert all(torch.equal(x, y) for x, y in zip(crops, crops_, strict=True))
    loader.close()


def test_validation__labels_are_the_training_classes_and_ranks_share(data_cfg, paths):
    shares = [
        list(validation_loader(_cfg(data_cfg, paths, ".h5"), rank=rank, world_size=2))
        for rank in range(2)
    ]
    labels = [torch.cat([y for _, y in share]).tolist() for share in shares]
    assert labels == [[1, 1, 2], [1, 2, 2]]
    expected = list(validation_loader(_cfg(data_cfg, paths, ""), rank=1, world_size=2))
    assert torch.equal(shares[1][0][0], expected[0][0])


def test_fraction__of_every_class(data_cfg, paths):
    loader = pretrain_loader(_cfg(data_cfg, paths, ".h5", data__fraction=0.34))
    assert loader.plan.num_samples == 3
    assert sorted(torch.cat([y for _, _, y in loader]).tolist()) == [0, 1, 2]


def test_damaged_image__named(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        h5.create_group("a").create_dataset("broken.jpg", data=np.zeros(9, dtype="uint8"))
    source = list_h5(tmp_path / "x.h5")
    with pytest.raises(
        UnreadableImageError, match=r"cannot read the image '.*x\.h5/a/broken\.jpg'"
    ):
        source.image(0)
    assert len(pickle.loads(pickle.dumps(source))) == 1  # with its file open


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"data__train_path": "/nowhere.h5"}, FileNotFoundError, "'/nowhere.h5' does not exist"),
        ({"data__train_path": "/"}, FileNotFoundError, "'/' is a folder, not an HDF5 file"),
        ({"data__train_path": __file__}, ValueError, "is no HDF5 file"),
        ({"data__source": "tar"}, ValueError, "contradicts data.source=tar: leave one out"),
        ({"data__dataset": "imagenet100"}, ValueError, "3 classes, and .*imagenet100 has 100: set"),
        ({"data__dataset": "cifar10"}, ValueError, "data.format=h5 reads image folders only"),
    ],
)
def test_what_cannot_be_read__one_sentence(data_cfg, paths, overrides, error, words):
    cfg = _cfg(data_cfg, paths, ".h5")
    for key, value in overrides.items():
        cfg["data"][key.removeprefix("data__")] = value
    with pytest.raises(error, match=words):
        pretrain_loader(cfg)


def test_foreign_class__named(data_cfg, paths, tmp_path):
    (tmp_path / "d").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "d" / "x.png")
    cfg = _cfg(data_cfg, paths, ".h5")
    (tmp_path / "folders").mkdir()
    (tmp_path / "d").rename(tmp_path / "folders" / "d")
    cfg["data"]["val_path"] = str(write_h5(tmp_path / "folders", tmp_path / "val.h5"))
    with pytest.raises(ValueError, match=r"data\.val_path=.*: 1 of its classes .* such as 'd'"):
        validation_loader(cfg)


def test_h5py_missing__one_sentence(data_cfg, paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py, which is not installed: pip install h5py"):
        pretrain_loader(_cfg(data_cfg, paths, ".h5"))
