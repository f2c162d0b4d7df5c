"""``pretrain``: from a composed recipe and a folder of pictures to a checkpoint, and on from there."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from PIL import Image

from dinovmf_plugin import host
from dinovmf_plugin.pretraining import pretrain
from tests.small_demo import small_demo


class PowerLoss(Exception):
    """The machine went away."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def _recipe(pictures: Path, folder: Path, *overrides: str) -> Any:
    given = [
        f"data.train_path={pictures / 'train'}",
        f"data.val_path={pictures / 'val'}",
        f"checkpoint.dir={folder}",
        "check_val_every_n_epoch=1",
        "max_epochs=2",
        "scheduler.warmup_epochs=1",
        "method_kwargs.monitor_every=3",
        "backbone.kwargs.drop_path_rate=0.3",
        "log_every_n_steps=1",
    ]
    return small_demo(*given, *overrides)


class DieAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise PowerLoss


def test_run__leaves_everything_in_one_folder(pictures, tmp_path):
    final = pretrain(_recipe(pictures, tmp_path, "knn_eval.enabled=True", "knn_eval.k=2"))
    folder = final.parent
    assert final.name == "demo-ep1.ckpt"
    assert folder.parent == tmp_path / "dino_vmf"
    content = torch.load(final, weights_only=True)
    assert content["global_step"] == 6  # 12 images in batches of 4, twice
    assert content["epoch"] == 1
    cfg = content["dinovmf_plugin"]["cfg"]
    assert cfg == json.loads((folder / "args.json").read_text())
    assert cfg["optimizer"]["lr"] == pytest.approx(3.2e-3 * 4 / 256)
    with open(next(folder.rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss_step", "val_acc1", "val_knn_acc1", "tau"):
        assert any(row.get(name) for row in rows), name
    assert (folder / "monitor.jsonl").is_file()
    assert [p.name for p in tmp_path.rglob("*.ckpt")].count("demo-ep1.ckpt") == 1


def test_auto_resume__after_a_crash__bit_for_bit_the_same_end(pictures, tmp_path):
    """The loader's order and augmentations, drop path, optimizer, center, EMA and schedules."""
    whole = pretrain(_recipe(pictures, tmp_path / "whole", "max_epochs=3"))
    parts = ("max_epochs=3", "auto_resume.enabled=True", "data.val_path=null")
    with pytest.raises(PowerLoss):
        pretrain(_recipe(pictures, tmp_path / "parts", *parts), callbacks=[DieAt(5)])
    resumed = pretrain(_recipe(pictures, tmp_path / "parts", *parts))
    assert len(list((tmp_path / "parts" / "dino_vmf").iterdir())) == 1
    a, b = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert a["global_step"] == b["global_step"] == 9
    for name, value in a["state_dict"].items():
        # without validation images the classifier's learning rate is another
        if not name.startswith("classifier"):
            assert torch.equal(value, b["state_dict"][name]), name
    again = pretrain(_recipe(pictures, tmp_path / "parts", *parts))
    assert again == resumed  # finished: nothing to do, and nothing overwritten


def test_auto_resume__other_cell__starts_afresh(pictures, tmp_path, capsys):
    switch = ("auto_resume.enabled=True", "max_epochs=1")
    first = pretrain(_recipe(pictures, tmp_path, *switch))
    content = first.read_bytes()
    second = pretrain(_recipe(pictures, tmp_path, *switch, "method_kwargs.centering=logit"))
    assert second.parent != first.parent
    assert torch.load(second, weights_only=True)["global_step"] == 3
    assert first.read_bytes() == content
    assert "resuming" not in capsys.readouterr().out


def test_resume_from_checkpoint__only_read_and_its_own_run_comes_first_later(
    pictures, tmp_path, capsys
):
    """The named one's folder stays; ``auto_resume`` then goes on with what the new run has written."""
    first = pretrain(_recipe(pictures, tmp_path / "out"))
    models = tmp_path / "models"
    models.mkdir()
    for name in ("my-best.ckpt", "colleague.ckpt"):
        (models / name).write_bytes(first.read_bytes())
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in models.rglob("*")}
    given = (f"resume_from_checkpoint={models / 'my-best.ckpt'}", "auto_resume.enabled=True")
    given = (*given, "max_epochs=4")
    with pytest.raises(PowerLoss):
        pretrain(_recipe(pictures, tmp_path / "new", *given), callbacks=[DieAt(10)])
    assert "resuming from" in (said := capsys.readouterr().out)
    assert str(models / "my-best.ckpt") in said
    last = pretrain(_recipe(pictures, tmp_path / "new", *given))
    assert f"resuming from {last.parent / 'demo-ep2.ckpt'}\n" in capsys.readouterr().out
    assert last.name == "demo-ep3.ckpt"
    assert last.parent.parent == tmp_path / "new" / "dino_vmf"
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in models.rglob("*")} == before
    assert torch.load(last, weights_only=True)["global_step"] == 12


def test_resume_from_checkpoint__missing_file__named(pictures, tmp_path):
    cfg = _recipe(pictures, tmp_path, f"resume_from_checkpoint={tmp_path / 'no.ckpt'}")
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint=.*no\.ckpt is not a file"):
        pretrain(cfg)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello", ["not a readable PyTorch checkpoint"]),
        ("", ["is empty"]),
        (torch.zeros(3), ["holds a Tensor"]),
        ({"student": {}, "teacher": {}, "epoch": 3}, ["it holds student, teacher", "init_from"]),
        (
            {"state_dict": {"fc.weight": torch.zeros(2)}},
            ["no optimizer_states, loops", "init_from"],
        ),
        ({"x": Evil()}, ["pickled objects other than weights"]),
    ],
)
def test_resume_from_checkpoint__what_cannot_be_resumed__one_sentence(
    pictures, tmp_path, monkeypatch, content, words
):
    path = tmp_path / "given.ckpt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint={path}") as caught:
        pretrain(_recipe(pictures, tmp_path / "runs", f"resume_from_checkpoint={path}"))
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("PWNED"))


def test_resume_from_checkpoint__foreign_run_and_too_few_epochs__one_sentence(pictures, tmp_path):
    path = pretrain(_recipe(pictures, tmp_path / "first"))
    content = torch.load(path, weights_only=True)
    given = f"resume_from_checkpoint={path}"
    fewer = (given, "max_epochs=1", "scheduler.warmup_epochs=0")
    with pytest.raises(
        ValueError, match=r"max_epochs=1 is less than the 2 epochs that .*ep1\.ckpt"
    ):
        pretrain(_recipe(pictures, tmp_path / "fewer", *fewer))
    del content["dinovmf_plugin"]  # any other project's
    content["state_dict"] = {"layer.weight": torch.zeros(3)}
    foreign = tmp_path / "foreign.ckpt"
    torch.save(content, foreign)
    with pytest.raises(ValueError, match=r"foreign\.ckpt: the checkpoint is of another network: "):
        pretrain(_recipe(pictures, tmp_path / "new", f"resume_from_checkpoint={foreign}"))


@pytest.mark.parametrize("case", ["missing", "empty", "unknown class", "unreadable"])
def test_validation_images__looked_at_before_the_first_step(pictures, tmp_path, case):
    val = tmp_path / "val"
    if case != "missing":
        (val / ("c" if case == "unknown class" else "a")).mkdir(parents=True)
    if case == "unknown class":
        Image.new("RGB", (40, 40)).save(val / "c" / "0.png")
    if case == "unreadable":
        (val / "a" / "0.png").write_bytes(b"no picture")
    steps: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    recipe = _recipe(
        pictures, tmp_path / "runs", f"data.val_path={val}", "check_val_every_n_epoch=2"
    )
    with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        pretrain(recipe, callbacks=[Count()])
    assert "val" in str(caught.value)
    assert steps == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.batch_size=64", ["12", "64"]),
        ("data.fraction=0.1", ["batch"]),
        ("data.format=webdataset", ["data.format", "webdataset"]),
    ],
)
def test_data_that_cannot_work__named_before_training(pictures, tmp_path, override, words):
    with pytest.raises(ValueError) as caught:
        pretrain(_recipe(pictures, tmp_path, override))
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("off", [False, True])
def test_convolutions__channels_last_unless_switched_off(pictures, tmp_path, capsys, off):
    cfg = OmegaConf.create(OmegaConf.to_container(_recipe(pictures, tmp_path, "max_epochs=1")))
    cfg.backbone = {"name": "resnet18", "kwargs": {}}
    cfg.method_kwargs.pop("use_bn_in_head", None)
    cfg.performance = {"disable_channel_last": off}
    cfg.debug_augmentations = True
    seen = {}

    class Look(Callback):
        def on_train_end(self, trainer, module) -> None:
            seen["weight"] = module.backbone.layer1[0].conv2.weight

    assert pretrain(cfg, callbacks=[Look()]) is not None
    assert seen["weight"].is_contiguous(memory_format=torch.channels_last) is not off
    printed = capsys.readouterr().out
    assert printed.count("Crop(size=") == sum(a.num_crops for a in cfg.augmentations)
    assert "crop 1: Crop(size=32, scale=(" in printed


def test_checkpoints_off__none_written(pictures, tmp_path):
    cfg = _recipe(pictures, tmp_path, "checkpoint.enabled=False", "max_epochs=1")
    assert pretrain(cfg) is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_hosts_own_method__same_runner(pictures, tmp_path):
    cfg = _recipe(pictures, tmp_path, "max_epochs=1", "data.val_path=null")
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    cfg.method = "simclr"
    cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
    cfg.augmentations = [cfg.augmentations[0], cfg.augmentations[1]]
    final = pretrain(cfg)
    assert final.parent.parent == tmp_path / "simclr"
    content = torch.load(final, weights_only=True)
    assert content["global_step"] == 3
    prefix = "encoder." if host.GENERATION == "release" else "backbone."
    assert any(name.startswith(prefix) for name in content["state_dict"])
