import ast
import importlib.util
import logging
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinovmf_plugin import data
from dinovmf_plugin.data.loaders import PretrainLoader
from dinovmf_plugin.data.module import pretrain_loader, training_images, validation_loader

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
FORMATS = ["image_folder", "dali"] if HAS_DALI else ["image_folder"]


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format_gives_the_same_order(data_cfg: Any, data_format: str) -> None:
    cfg = OmegaConf.create(data_cfg(data__format=data_format))
    OmegaConf.set_struct(cfg, True)
    loader, plain = pretrain_loader(cfg), pretrain_loader(data_cfg())
    assert len(loader) == 5
    for mine, theirs in zip(loader, plain, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[2], theirs[2])


@pytest.mark.parametrize("data_format", FORMATS)
def test_global_random_numbers_are_left_alone(data_cfg: Any, data_format: str) -> None:
    """What a model draws must not depend on how its images are loaded."""
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(pretrain_loader(data_cfg(data__format=data_format)))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


@pytest.mark.parametrize("data_format", FORMATS)
def test_seed_rank_and_fraction(data_cfg: Any, data_format: str) -> None:
    cfg = data_cfg(data__format=data_format, data__fraction=0.75, optimizer__batch_size=2)
    ranks = [pretrain_loader(cfg, rank=rank, world_size=2, seed=9) for rank in range(2)]
    assert [len(loader) for loader in ranks] == [4, 4]
    seen = torch.cat([batch[0] for loader in ranks for batch in loader])
    assert len(seen.unique()) == 16
    assert seen.max() < 16  # of the 16 images that are left, all
    other = pretrain_loader(cfg, seed=8)
    assert other.plan.indices(0).tolist() != pretrain_loader(cfg).plan.indices(0).tolist()


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("data_format", FORMATS)
def test_indexes_are_true_whether_encoded_into_labels_or_not(
    data_cfg: Any, data_format: str, encode: bool
) -> None:
    cfg = data_cfg(data__format=data_format, dali__encode_indexes_into_labels=encode)
    labels = training_images(cfg).labels
    for indexes, _, targets in pretrain_loader(cfg):
        assert targets.tolist() == labels[indexes.numpy()].tolist()


def test_unlabeled(data_cfg: Any) -> None:
    loader = pretrain_loader(data_cfg(data__no_labels=True))
    assert all((batch[2] == -1).all() for batch in loader)


def test_unreadable_images(data_cfg: Any, tmp_path: Path, picture_folder: Any, caplog: Any) -> None:
    root = picture_folder(tmp_path, 10)
    (root / "cat" / "bad.jpg").write_bytes(b"<html>")
    cfg = data_cfg(data__train_path=str(root))
    with pytest.raises(
        RuntimeError, match=r"data\.train_path: 1 of 11 images cannot .*cat/bad\.jpg"
    ):
        pretrain_loader(cfg)
    with caplog.at_level(logging.WARNING):
        loader = pretrain_loader(data_cfg(data__train_path=str(root), data__skip_unreadable=True))
    assert loader.plan.num_samples == 10
    assert "data.train_path: 1 unreadable of 11 images are left out" in caplog.text
    unchecked = pretrain_loader(data_cfg(data__train_path=str(root), data__check_images="none"))
    assert unchecked.plan.num_samples == 11
    with pytest.raises(RuntimeError, match=r"data\.val_path: 1 of 11 images cannot .*cat/bad\.jpg"):
        validation_loader(data_cfg(data__val_path=str(root)))


def check_in_two_processes(rank: int, root: str) -> tuple[int, str]:
    from dinovmf_plugin.data import module

    looked_at: list[int] = []
    original = module.find_unreadable

    def counted(paths: Any, **kwargs: Any) -> Any:
        looked_at.append(len(paths))
        return original(paths, **kwargs)

    module.find_unreadable = counted  # type: ignore[attr-defined]
    try:
        module.training_images({"data": {"train_path": root}}, world_size=2)
    except RuntimeError as error:
        return sum(looked_at), str(error)
    finally:
        module.find_unreadable = original  # type: ignore[attr-defined]
    return sum(looked_at), ""


def test_two_processes_share_the_check_and_agree(
    ddp: Any, tmp_path: Path, picture_folder: Any
) -> None:
    root = picture_folder(tmp_path, 9)
    for name in ("cat/bad.jpg", "dog/bad.jpg", "dog/worse.jpg"):
        (root / name).write_bytes(b"<html>")
    (first, message), (second, other) = ddp(check_in_two_processes, str(root))
    assert (first, second) == (6, 6)
    assert message == other
    assert "3 of 12 images cannot be read" in message


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"data__format": "hdf5"},
            ValueError,
            r"data\.format must be one of .*, got 'hdf5'",
        ),
        (
            {"data__dataset": "coco"},
            ValueError,
            r"data\.dataset must be one of .*'custom'.*, got 'coco'",
        ),
        ({"data__train_path": None}, ValueError, "data.train_path is missing"),
        (
            {"data__train_path": "/nowhere"},
            FileNotFoundError,
            "data.train_path: '/nowhere' does not exist",
        ),
        ({"data__fraction": 2}, ValueError, "data.fraction must be above 0"),
        ({"data__check_images": "slow"}, ValueError, "data.check_images must be one of"),
        ({"optimizer__batch_size": 100}, ValueError, r"fewer images \(22\) than one batch"),
        ({"optimizer__batch_size": None}, ValueError, "optimizer.batch_size is missing"),
        ({"augmentations": []}, ValueError, "augmentations must be a list"),
        (
            {"data__dataset": "cifar10", "data__format": "dali"},
            ValueError,
            "data.format=dali reads image folders only",
        ),
    ],
)
def test_bad_config(data_cfg: Any, overrides: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pretrain_loader(data_cfg(**overrides))


def write_cifar10(root: Path) -> None:
    """CIFAR-10's files with ten pictures each; torchvision wants their published checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        content = {
            "data": rng.integers(0, 256, (10, 3072), dtype=np.uint8),
            "labels": list(range(10)),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar10(data_cfg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = data_cfg(
        data__dataset="cifar10", data__train_path=str(tmp_path), data__val_path=str(tmp_path)
    )
    with pytest.raises(
        FileNotFoundError, match=r"data\.dataset=cifar10: the data set is not in .*CIFAR10\("
    ):
        pretrain_loader(cfg)
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    cfg["data"]["fraction"] = 0.4
    loader = pretrain_loader(cfg)
    assert isinstance(loader, PretrainLoader)
    assert loader.plan.num_samples == 20
    _, crops, targets = next(iter(loader))
    assert crops[0].shape == (4, 3, 32, 32)
    assert ((targets >= 0) & (targets < 10)).all()
    ((images, labels), *_) = validation_loader(cfg)
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("data_format", FORMATS)
def test_validation_loader(data_cfg: Any, folder: Path, data_format: str) -> None:
    assert validation_loader(data_cfg()) is None
    cfg = data_cfg(data__format=data_format, data__val_path=str(folder))
    shares = [list(validation_loader(cfg, rank=rank, world_size=2)) for rank in range(2)]
    assert [sum(len(labels) for _, labels in share) for share in shares] == [11, 11]
    assert shares[0][0][0].shape == (4, 3, 32, 32)
    whole = torch.cat([labels for _, labels in validation_loader(cfg, train=True)])
    halves = [torch.cat([labels for _, labels in share]) for share in shares]
    assert whole.tolist() == torch.stack(halves, dim=1).flatten().tolist()
    assert whole.tolist() == training_images(cfg).labels.tolist()


def load_on_the_first_alone(rank: int, cfg: Any) -> int:
    from dinovmf_plugin.data.module import validation_loader

    return sum(len(labels) for _, labels in validation_loader(cfg, train=True)) if rank == 0 else 0


def test_validation_loader__one_process_of_several(data_cfg: Any, ddp: Any) -> None:
    """A curve is drawn by the first process alone: nothing there may wait for the others."""
    assert ddp(load_on_the_first_alone, data_cfg()) == [22, 0]


def test_validation_labels__are_the_training_classes(data_cfg: Any, tmp_path: Path) -> None:
    for name, classes in (("train", "abc"), ("val", "bc"), ("other", "bd")):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / name / label / "x.png")
    paths = {"data__train_path": str(tmp_path / "train"), "data__val_path": str(tmp_path / "val")}
    ((_, labels),) = validation_loader(data_cfg(**paths))
    assert labels.tolist() == [1, 2]
    paths["data__val_path"] = str(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"data\.val_path=.*other: 1 of its classes .* such as 'd'"
    ):
        validation_loader(data_cfg(**paths))


def test_neither_solo_nor_lightning_is_imported() -> None:
    room = Path(data.__file__).parent
    imported = set()
    for file in room.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert "torch" in imported
    assert not imported & {"solo", "lightning", "pytorch_lightning"}


def test_missing_dali_is_said(data_cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dinovmf_plugin.data.dali.pipeline", None)
    monkeypatch.delitem(sys.modules, "dinovmf_plugin.data.dali.loaders", raising=False)
    with pytest.raises(ImportError, match="DALI is not installed: .* set data.format=image_folder"):
        pretrain_loader(data_cfg(data__format="dali"))
