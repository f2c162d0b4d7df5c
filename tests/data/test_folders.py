import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from dinovmf_plugin.data.folders import list_images, take_fraction


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_labeled__same_samples_as_torchvision(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/2.jpg", "b/deep/er/1.PNG", "b/10.jpeg", "a/z.webp", "a/notes.txt", "C/1.tiff"
    )
    ours, theirs = list_images(tmp_path), TorchvisionImageFolder(str(tmp_path))
    assert list(ours.classes) == theirs.classes == ["C", "a", "b"]
    found = {(ours.path(i), int(ours.labels[i])) for i in range(len(ours))}
    assert found == set(theirs.samples)


def test_unlabeled__any_depth_in_one_order(tmp_path: Path) -> None:
    touch(tmp_path, "x/2.jpg", "1.jpg", "x/y/3.jpg", ".hidden/4.jpg", "._1.jpg", "readme.md")
    images = list_images(tmp_path, labeled=False)
    assert sorted(images.path(i) for i in range(len(images))) == [
        str(tmp_path / name) for name in ("1.jpg", "x/2.jpg", "x/y/3.jpg")
    ]
    assert images.labels.tolist() == [-1, -1, -1]
    assert images.classes == ()
    again = list_images(tmp_path, labeled=False)
    assert (again.names == images.names).all()


def test_unusual_names(tmp_path: Path) -> None:
    names = ["Ärger/ø 1.jpg", "b/" + "long" * 40 + ".jpg"]
    touch(tmp_path, *names)
    images = list_images(tmp_path)
    assert sorted(images.path(i) for i in range(2)) == sorted(
        str(tmp_path / name) for name in names
    )


@pytest.mark.parametrize(
    ("names", "labeled", "error", "message"),
    [
        ((), True, ValueError, r"data\.train_path: there are no images \(\.jpg, .*\) in '.*data'"),
        ((), False, ValueError, r"data\.train_path: there are no images"),
        (("a/notes.txt",), True, ValueError, "there are no images"),
        (
            ("1.jpg", "2.jpg"),
            True,
            ValueError,
            "has 2 images but no class folders.*data.no_labels=True",
        ),
        (("a/1.jpg", "b/notes.txt"), True, ValueError, "the class folder '.*b' has no images"),
    ],
)
def test_bad_folders(tmp_path: Path, names: Any, labeled: bool, error: Any, message: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(error, match=message):
        list_images(touch(root, *names), labeled=labeled)


def test_links_and_pipes(tmp_path: Path) -> None:
    touch(tmp_path / "data", "a/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "data/a/pipe.jpg")  # opening it would wait for ever
    images = list_images(tmp_path / "data")
    assert [Path(images.path(i)).name for i in range(3)] == ["1.jpg", "gone.jpg", "2.jpg"]
    assert len(images) == 3
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    for labeled in (True, False):
        with pytest.raises(ValueError, match="a/loop is a link to a folder that holds it"):
            list_images(tmp_path / "data", labeled=labeled)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.val_path: '.*nowhere' does not exist"):
        list_images(tmp_path / "nowhere", key="data.val_path")
    touch(tmp_path, "file")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        list_images(tmp_path / "file")


def test_images_beside_the_classes_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "2.jpg")
    with pytest.warns(UserWarning, match="1 images that lie beside the class folders"):
        assert len(list_images(tmp_path)) == 1


def test_fraction__same_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    chosen = take_fraction(labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [10, 4, 1]
    assert (np.diff(chosen) > 0).all()
    assert (take_fraction(labels, 0.1) == chosen).all()
    assert (take_fraction(labels, 0.1, seed=1) != chosen).any()


def test_fraction__unlabeled_and_all() -> None:
    labels = np.full(50, -1)
    assert len(take_fraction(labels, 0.5)) == 25
    for everything in (None, -1, -1.0, 1, 1.0):
        assert (take_fraction(labels, everything) == np.arange(50)).all()


@pytest.mark.parametrize("fraction", [0, 1.5, -0.5, float("nan")])
def test_fraction__out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"data\.fraction must be above 0 and at most 1, or -1"):
        take_fraction(np.zeros(5, dtype=int), fraction)
