"""Config processing: the host's own results where it has one, and a named key where it fails."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinovmf_plugin import host
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.training.config import count_devices, parse_cfg
from dinovmf_plugin.training.folders import run_identity

RRC = {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0}
RECIPE: dict[str, Any] = {
    "name": "run",
    "method": "dino_vmf",
    "max_epochs": 10,
    "backbone": {"name": "vit_small"},
    "data": {"dataset": "imagenet100", "train_path": "train", "val_path": "val"},
    "augmentations": [
        {"crop_size": 224, "num_crops": 1, "rrc": RRC},
        {"crop_size": 224, "num_crops": 1, "rrc": RRC},
        {"crop_size": 96, "num_crops": 10, "rrc": RRC},
    ],
    "optimizer": {
        "name": "adamw",
        "batch_size": 64,
        "lr": 5e-4,
        "weight_decay": 0.04,
        "classifier_lr": 1e-3,
    },
    "scheduler": {"name": "warmup_cosine"},
    "devices": [0, 1, 2, 3],
}


def _recipe(**changes: Any) -> Any:
    cfg = OmegaConf.create(copy.deepcopy(RECIPE))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (1, 1),
        (8, 8),
        ("1", 1),
        ("4", 4),
        ([0], 1),
        ([0, 3], 2),
        ((0, 1, 2), 3),
        ("0,1", 2),
        ("0,1,", 2),
        (OmegaConf.create([5, 6]), 2),
        ("auto", 1),
        (-1, 1),
        ("-1", 1),
        (None, 1),
    ],
)
def test_count_devices__lightnings_spellings(devices, expected):
    assert count_devices(devices, "cpu") == expected


@pytest.mark.parametrize("devices", [0, "0", -2, "two", "gpu", 1.5])
def test_count_devices__anything_else__named(devices):
    with pytest.raises(ValueError, match="devices=.* is not understood"):
        count_devices(devices)


def test_parse_cfg__counts_and_scales():
    cfg = parse_cfg(_recipe(num_nodes=2))
    assert cfg.data.num_classes == 100
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 10)
    # 64 images x 4 devices x 2 nodes = 512 = 2 x 256
    assert cfg.optimizer.lr == pytest.approx(1e-3)
    assert cfg.optimizer.classifier_lr == pytest.approx(2e-3)
    assert list(cfg.optimizer.kwargs.betas) == [0.9, 0.999]
    assert (cfg.checkpoint.enabled, cfg.auto_resume.enabled) == (False, False)
    assert cfg.wandb.enabled is False


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("adamw", {}, {"betas": [0.9, 0.999]}),
        ("adamw", {"betas": [0.9, 0.95]}, {"betas": [0.9, 0.95]}),
        ("sgd", {}, {"momentum": 0.9}),
        ("sgd", {"momentum": 0.5}, {"momentum": 0.5}),
    ],
)
def test_parse_cfg__optimizer_defaults(name, kwargs, expected):
    cfg = parse_cfg(_recipe(**{"optimizer.name": name, "optimizer.kwargs": kwargs}))
    assert OmegaConf.to_container(cfg.optimizer.kwargs) == expected


def test_parse_cfg__custom_folder__classes_are_folders(tmp_path):
    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    changes = {"data.dataset": "custom", "data.train_path": str(tmp_path)}
    assert parse_cfg(_recipe(**changes)).data.num_classes == 3
    assert parse_cfg(_recipe(**changes, **{"data.no_labels": True})).data.num_classes == 1
    changes["data.train_path"] = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"data\.train_path=.*nowhere is not a folder"):
        parse_cfg(_recipe(**changes))


def test_parse_cfg__hidden_folders__no_classes_and_the_same_run(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints", ".cache/thumbnails"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("cat/1.png", "dog/1.png", ".cache/1.png", "cat/.ipynb_checkpoints/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    cfg = parse_cfg(_recipe(**{"data.dataset": "custom", "data.train_path": str(tmp_path)}))
    assert cfg.data.num_classes == 2
    images = list_images(tmp_path)
    assert (images.classes, len(images)) == (("cat", "dog"), 2)
    (tmp_path / ".ipynb_checkpoints").rmdir()
    again = parse_cfg(_recipe(**{"data.dataset": "custom", "data.train_path": f"{tmp_path}/"}))
    assert run_identity(again) == run_identity(cfg)


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "method",
        "backbone.name",
        "data.dataset",
        "data.train_path",
        "max_epochs",
        "optimizer.name",
        "optimizer.batch_size",
        "optimizer.lr",
        "optimizer.weight_decay",
        "scheduler.name",
        "augmentations",
    ],
)
@pytest.mark.parametrize("missing", [None, "???"])
def test_parse_cfg__missing_key__named(key, missing):
    with pytest.raises(ValueError, match=rf"{key} is missing from the config: .*{key}="):
        parse_cfg(_recipe(**{key: missing}))


def test_parse_cfg__unknown_dataset__named():
    with pytest.raises(ValueError, match=r"data\.dataset='imagnet' is unknown: choose one of"):
        parse_cfg(_recipe(**{"data.dataset": "imagnet"}))


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("val_path", ["val", None])
def test_parse_cfg__leaves_the_recipe_and_scales_once(val_path):
    recipe = _recipe(**{"data.val_path": val_path, "num_nodes": 2})
    before = _plain(recipe)
    once = parse_cfg(recipe)
    assert _plain(recipe) == before
    twice = parse_cfg(once)
    assert _plain(twice) == _plain(once)
    assert (once.optimizer.base_lr, once.optimizer.lr) == (5e-4, 1e-3)
    assert once.optimizer.classifier_lr == (2e-3 if val_path else 1e-3)
    unscaled = _recipe(**{"data.val_path": val_path, "num_nodes": 2, "optimizer.base_lr": 5e-4})
    unscaled.optimizer.lr = 1e-3
    assert parse_cfg(unscaled).optimizer.lr == 1e-3
    assert run_identity(twice) == run_identity(once)


def test_parse_cfg__a_parsed_config_with_another_rate_or_batch__refused():
    for key, value in (("optimizer.lr", 2e-3), ("optimizer.batch_size", 128), ("devices", 1)):
        cfg = parse_cfg(_recipe())
        OmegaConf.update(cfg, key, value)
        with pytest.raises(
            ValueError, match=r"optimizer\.lr=.* is not optimizer\.base_lr=0\.0005 x"
        ):
            parse_cfg(cfg)
        del cfg.optimizer.base_lr, cfg.optimizer.base_classifier_lr
        assert (
            parse_cfg(cfg).optimizer.base_lr == cfg.optimizer.lr
        )  # left out: the rate per 256 images


@pytest.mark.parametrize(
    ("key", "value", "count"),
    [("data.num_classes", 7, 100), ("data.num_large_crops", 3, 2), ("data.num_small_crops", 0, 10)],
)
def test_parse_cfg__counted_numbers__not_chosen(key, value, count):
    assert OmegaConf.select(parse_cfg(_recipe(**{key: count})), key) == count
    with pytest.raises(
        ValueError, match=rf"{key}={value} is counted, not chosen, .* {count}: leave"
    ):
        parse_cfg(_recipe(**{key: value}))


def test_parse_cfg__what_only_the_host_serves__said():
    with pytest.warns(UserWarning, match=r"auto_resume\.max_hours has no effect"):
        parse_cfg(_recipe(**{"auto_resume": {"max_hours": 3}}))


@pytest.mark.skipif(host.GENERATION != "main", reason="1.0.2 has argparse, no parse_cfg(cfg)")
@pytest.mark.parametrize("val_path", ["val", None])
@pytest.mark.parametrize("dataset", ["imagenet", "imagenet100", "cifar10", "custom"])
@pytest.mark.parametrize("devices", [[0, 1, 2], "1"])
def test_parse_cfg__equals_the_hosts(tmp_path, val_path, dataset, devices):
    from solo.args.pretrain import parse_cfg as host_parse_cfg

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changes = {
        "data.dataset": dataset,
        "data.train_path": str(tmp_path),
        "data.val_path": val_path,
        "data.format": "image_folder",
        "devices": devices,
        "seed": 3,
        "strategy": "auto",
    }
    theirs = OmegaConf.to_container(host_parse_cfg(_recipe(**changes)), resolve=True)
    ours = OmegaConf.to_container(parse_cfg(_recipe(**changes)), resolve=True)

    def common(a: Any, b: Any, path: str = "") -> list[str]:
        if not isinstance(a, dict):
            assert a == b, path
            return [path]
        return [p for k in a.keys() & b.keys() for p in common(a[k], b[k], f"{path}.{k}")]

    compared = common(theirs, ours)
    assert {
        ".optimizer.lr",
        ".optimizer.classifier_lr",
        ".data.num_classes",
        ".data.num_large_crops",
        ".data.num_small_crops",
        ".checkpoint.frequency",
    } <= set(compared)
    assert Path(ours["data"]["train_path"]) == tmp_path
