"""``import dinovmf_plugin as dv``: the names it promises, and what they do."""

from __future__ import annotations

import csv
import doctest
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import dinovmf_plugin as dv
from dinovmf_plugin import api
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.recipes import compose_anywhere
from tests.analysis.conftest import image_folders, networks, plugin_checkpoint

__all__ = ["image_folders", "networks", "plugin_checkpoint"]

PROMISED = {
    "EmbeddedImages",
    "Run",
    "__version__",
    "analyze",
    "embed",
    "knn_accuracy",
    "load_backbone",
    "load_head",
    "pretrain",
    "register",
}
ROOT = Path(__file__).parents[1]
SMALL = {
    "optimizer.batch_size": 4,
    "scheduler.warmup_epochs": 0,
    "method_kwargs.num_prototypes": 32,
    "method_kwargs.proj_hidden_dim": 16,
    "method_kwargs.proj_output_dim": 8,
    "data": {"format": "image_folder", "num_workers": 0},
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


# ---- the promise -----------------------------------------------------------------------------------


def test_names__are_those_promised():
    assert set(dv.__all__) == PROMISED
    assert set(dir(dv)) >= PROMISED
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        dv.pretrian  # noqa: B018


def _typed(function: Any) -> None:
    hints = typing.get_type_hints(function)
    for name in inspect.signature(function).parameters:
        assert name == "self" or name in hints, f"{function.__qualname__}: {name} has no type"
    assert "return" in hints, function.__qualname__


@pytest.mark.parametrize("name", sorted(PROMISED - {"__version__"}))
def test_every_name__is_typed_documented_and_shown(name):
    thing = getattr(dv, name)
    examples = [part for part in doctest.DocTestFinder(recurse=False).find(thing) if part.examples]
    assert examples, f"{name} has no doctest"
    assert thing.__module__.startswith("dinovmf_plugin")  # where pytest runs them
    if not inspect.isclass(thing):
        _typed(thing)
        assert "Returns:" in thing.__doc__
        assert "Raises:" in thing.__doc__
        return
    for member, value in vars(thing).items():
        if not member.startswith("_"):
            assert value.__doc__, f"{name}.{member} has no docstring"
            if isinstance(value, property):
                _typed(value.fget)
            elif callable(value):
                _typed(value)


def test_import__loads_nothing_before_it_is_asked_for():
    code = (
        "import sys, dinovmf_plugin as dv; dir(dv); hasattr(dv, 'nothing');"
        "print([m for m in sys.modules if m.startswith('dinovmf_plugin.')"
        " or m in ('torch', 'numpy', 'hydra', 'lightning')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dinovmf_plugin._version']"


# ---- pretrain --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(image_folders, tmp_path_factory) -> dv.Run:
    return dv.pretrain(
        "demo_recipe",
        image_folders / "train",
        val_data=image_folders / "val",
        output_dir=tmp_path_factory.mktemp("runs"),
        max_epochs=2,
        name="photos",
        settings={**SMALL, "method_kwargs.monitor_every": 1, "check_val_every_n_epoch": 1},
    )


def test_run__reads_back_what_was_written(run, tmp_path):
    assert run.checkpoint.name == "photos-ep1.ckpt"
    content = torch.load(run, weights_only=True)
    assert (
        run.recipe
        == content["dinovmf_plugin"]["cfg"]
        == json.loads((run.folder / "args.json").read_text())
    )
    assert run.recipe["max_epochs"] == 2
    assert run.recipe["data"]["no_labels"] is False
    assert run.paths["photos-ep1.ckpt"] == run.checkpoint
    assert "monitor.jsonl" in run.paths
    steps, values = run.curves[
        "train_loss_epoch" if "train_loss_epoch" in run.curves else "train_loss"
    ]
    (log,) = run.folder.rglob("metrics.csv")
    with open(log) as file:
        rows = [row for row in csv.DictReader(file) if row.get("train_loss_epoch")]
    assert steps == [int(row["step"]) for row in rows]
    assert values == [float(row["train_loss_epoch"]) for row in rows]
    assert len(run.curves["monitor/target_information"][0]) == 6
    assert run.alarms == []


def test_curves__of_a_stopped_run__the_later_value_counts(tmp_path):
    for number, rows in enumerate(["0,1.0,\n1,2.0,\n2,3.0,\n", "1,5.0,\n2,,\n3,6.0,7\n"]):
        folder = tmp_path / "metrics" / f"version_{number + 9}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,loss,accuracy\n{rows}")
    curves = dv.Run(tmp_path / "a.ckpt").curves
    assert curves == {"loss": ([0, 1, 2, 3], [1.0, 5.0, 3.0, 6.0]), "accuracy": ([3], [7.0])}


def test_curves__what_log_and_monitor_both_have__is_one_point_a_record(tmp_path):
    (tmp_path / "metrics").mkdir()
    log = "step,monitor/kl,monitor/kappa_median\n19,0.5,\n39,0.25,\n39,,25.0\n"
    (tmp_path / "metrics" / "metrics.csv").write_text(log)
    records = [{"kind": "step", "epoch": 0, "step": s, "kl": v} for s, v in ((20, 0.5), (40, 0.25))]
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert dv.Run(tmp_path / "a.ckpt").curves == {
        "monitor/kl": ([20, 40], [0.5, 0.25]),
        "monitor/kappa_median": ([39], [25.0]),
    }


@pytest.fixture
def given(monkeypatch):
    """The recipe that ``pretrain`` hands on, without training."""
    seen = SimpleNamespace()

    def train(cfg, callbacks):
        seen.cfg = cfg
        return Path("x.ckpt")

    monkeypatch.setattr(api, "_pretrain", train)
    return seen


def test_keywords__are_keys_of_the_recipe(given, image_folders):
    dv.pretrain(
        "custom/dino_vmf",
        image_folders / "flat",
        method="ibot_vmf",
        max_epochs=np.int64(3),
        optimizer={"lr": 0.1},
        settings={"optimizer.weight_decay": 0.2, "backbone.kwargs.drop_path_rate": 0.3},
        resume=True,
    )
    cfg = given.cfg
    assert cfg.method == "ibot_vmf"
    as_composed = compose_anywhere("custom/dino_vmf", ["method=ibot_vmf"])
    assert cfg.method_kwargs == as_composed.method_kwargs
    assert cfg.method_kwargs != compose_anywhere("custom/dino_vmf").method_kwargs
    assert (cfg.max_epochs, cfg.optimizer.lr, cfg.optimizer.weight_decay) == (3, 0.1, 0.2)
    untouched = compose_anywhere("custom/dino_vmf").optimizer.batch_size
    assert cfg.optimizer.batch_size == untouched  # the rest of the group stays
    assert cfg.backbone.kwargs.drop_path_rate == 0.3
    assert cfg.auto_resume.enabled
    assert cfg.checkpoint.enabled
    assert cfg.data.no_labels  # a folder without folders
    dv.pretrain("custom/dino_vmf", image_folders / "train")
    assert not given.cfg.data.no_labels


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d: dv.pretrain("custom/dino_vfm", d), "recipe='custom/dino_vfm'"),
        (lambda d: dv.pretrain("custom/dino_vmf", d, method="dino_vfm"), "method=dino_vfm"),
        (lambda d: dv.pretrain("custom/dino_vmf", d, max_epochs=0), "max_epochs=0"),
        (
            lambda d: dv.pretrain("custom/dino_vmf", d, settings={"optimizer.lrr": 1}),
            "optimizer.lrr is no key of a recipe: did you mean optimizer.lr?",
        ),
        (lambda d: dv.pretrain("custom/dino_vmf", "nowhere"), "nowhere"),
        (
            lambda d: dv.pretrain("custom/dino_vmf", d, settings={"checkpoint.enabled": False}),
            "checkpoint.enabled=False leaves no run",
        ),
        (lambda d: dv.knn_accuracy("pixels", d, d, kss=3), "kss is no known key: known keys are"),
        (lambda d: dv.embed("pixels", d), "checkpoint=pixels has no prototypes"),
        (lambda d: dv.embed("pixels", d, mixture=False, weights="x"), "weights='x'"),
        (lambda d: dv.embed("pixels", d, mixture=False, precision="x"), "precision='x' must be"),
        (lambda d: dv.embed("pixels", d, mixture=False, batch_size=0), "batch_size=0 must be"),
    ],
)
def test_what_cannot_be__is_one_sentence(call, sentence, image_folders):
    with pytest.raises((ValueError, OSError)) as caught:
        call(image_folders / "train")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_within_another_hydra_application__its_own_recipes_are_found(
    given, image_folders, tmp_path
):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        dv.pretrain("custom/dino_vmf", image_folders / "train")
        assert given.cfg.method == "dino_vmf"
        assert compose("theirs").a == 1
    assert not GlobalHydra.instance().is_initialized()


# ---- embed -----------------------------------------------------------------------------------------

KINDS = [
    "folder",
    "paths",
    "strings",
    "PIL",
    "array",
    "arrays",
    "mixed",
    "pixels",
    "loader",
    "generator",
]
CROP = CenterCrop(resize=18, size=16)


@pytest.fixture(scope="module")
def paths(image_folders) -> list[Path]:
    return sorted((image_folders / "train").rglob("*.png"))


@pytest.fixture(scope="module")
def expected(networks, paths) -> dict[str, torch.Tensor]:
    vit, head = networks
    with torch.no_grad():
        pixels = torch.stack([CROP(Image.open(path).convert("RGB")) for path in paths])
        features = vit(pixels)
        y = head(features)
        logits = head.last_layer(y, 0.05)
    return {"pixels": pixels, "features": features, "y": y, "probabilities": logits.softmax(-1)}


def _kinds(paths: list[Path], pixels: torch.Tensor) -> dict[str, Any]:
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    labeled = TensorDataset(pixels, torch.arange(len(pixels)))
    return {
        "folder": paths[0].parents[1],
        "paths": paths,
        "strings": list(map(str, paths)),
        "PIL": pictures,
        "array": arrays,
        "arrays": list(arrays),
        "mixed": [paths[0], pictures[1], arrays[2], *paths[3:]],
        "pixels": pixels,
        "loader": DataLoader(labeled, batch_size=5),
        "generator": (part for part in pixels.split(5)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_embed__takes_images_of_every_kind(kind, plugin_checkpoint, paths, expected):
    images = _kinds(paths, expected["pixels"])[kind]
    found = dv.embed(plugin_checkpoint, images, batch_size=4, num_workers=0, device="cpu")
    assert len(found) == len(paths)
    torch.testing.assert_close(found.features, expected["features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.embeddings, expected["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.responsibilities(), expected["probabilities"], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(found.component, expected["probabilities"].argmax(-1))
    torch.testing.assert_close(
        found.responsibility, expected["probabilities"].amax(-1), atol=1e-4, rtol=1e-4
    )
    numbers, files = [f"image {i}" for i in range(12)], list(map(str, paths))
    named = kind in ("folder", "paths", "strings")
    mixed = [files[0], *numbers[1:3], *files[3:]]
    assert list(found.names) == (mixed if kind == "mixed" else files if named else numbers)


def test_typicality__is_the_rank_of_the_likelihood(plugin_checkpoint, paths):
    found = dv.embed(plugin_checkpoint, paths, device="cpu")
    ranks = [
        float((found.log_likelihood <= value).double().mean()) for value in found.log_likelihood
    ]
    assert found.typicality().tolist() == pytest.approx(ranks)
    few = dv.embed(plugin_checkpoint, paths[:3], device="cpu")
    share = [
        float((found.log_likelihood <= value + 1e-6).double().mean())
        for value in few.log_likelihood
    ]
    assert few.typicality(found).tolist() == pytest.approx(share, abs=1 / 12 + 1e-9)


def test_one_picture__gray_and_without_a_mixture():
    gray = Image.fromarray(np.full((40, 40), 128, dtype=np.uint8))
    found = dv.embed("pixels", gray, mixture=False, crop_size=32)
    level = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(
        found.features, level.repeat_interleave(1024)[None], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="embedded with mixture=False"):
        found.responsibilities()


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "images holds no image"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "images holds no image"),
        (torch.zeros(0, 3, 16, 16), "images holds no image"),
        (iter(()), "images holds no image"),
        (np.zeros((8, 8, 3), dtype=np.uint8), r"for a single picture give images\[None\]"),
        (np.zeros((2, 8, 8, 3)), "image 0 is an array of 8 x 8 x 3 float64: uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "pixels must be normalized floats"),
        (torch.zeros(3, 16, 16), r"batches of \(3, 16, 16\): tensors"),
        ([torch.zeros(3, 16, 16)], "a list with Tensor at 0"),
        (DataLoader([{"a": 1}]), r"batches of dict: tensors"),
        (3, "images=int is not understood"),
        ("nowhere/", "neither a folder nor a file"),
        (["nowhere.png"], "image 0: there is no file nowhere.png"),
    ],
)
def test_images_that_are_none__are_told(images, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        dv.embed("pixels", images, mixture=False, crop_size=16, num_workers=0)


def test_a_file_that_is_no_picture__is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(Exception, match=r"a\.png.*cannot identify"):
        dv.embed("pixels", [tmp_path / "a.png"], mixture=False, crop_size=16)


# ---- what takes a run ------------------------------------------------------------------------------


def test_a_run__goes_everywhere(run, image_folders, tmp_path):
    train, val = image_folders / "train", image_folders / "val"
    backbone, report = dv.load_backbone(run)
    head, settings = dv.load_head(run)
    assert report.which == "teacher"
    assert settings.method == "dino_vmf"
    found = dv.embed(run, val, device="cpu", num_workers=0)
    crop = CenterCrop(resize=37, size=32)
    pixels = torch.stack([crop(Image.open(path).convert("RGB")) for path in found.names])
    with torch.no_grad():
        features = backbone(pixels)
        y = head(features)
    torch.testing.assert_close(found.features, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.embeddings, y, atol=1e-4, rtol=1e-4)
    keys = {"knn.crop_size": 32, "knn.resize": 37, "data.num_workers": 0}
    accuracy = dv.knn_accuracy(run, train, val, ks=[1, 3], settings=keys, output_dir=tmp_path)
    bank = dv.embed(run, train, device="cpu", num_workers=0)
    cosine = (
        torch.nn.functional.normalize(found.features)
        @ torch.nn.functional.normalize(bank.features).T
    )
    labels = [Path(bank.names[i]).parent.name for i in cosine.argmax(dim=1).tolist()]
    right = [
        Path(name).parent.name == label for name, label in zip(found.names, labels, strict=True)
    ]
    assert accuracy[1][0] == pytest.approx(100 * np.mean(right))
    assert set(accuracy) == {1, 3}
    assert json.loads((tmp_path / "knn.json").read_text())["k3"]["top1"] == accuracy[3][0]
    result = dv.analyze(
        run,
        train,
        tmp_path / "analysis",
        name="ours",
        settings={"attention.images": 0, "gallery.components": 1, "data.num_workers": 0},
        device="cpu",
    )
    assert result["name"] == "ours"
    assert result["usage"]["images"] == 12
    assert (tmp_path / "analysis" / "analysis.html").is_file()


# ---- torch.hub -------------------------------------------------------------------------------------


def test_torch_hub__loads_from_the_clone(plugin_checkpoint, expected):
    def load(name: str, **kwargs: Any) -> Any:
        return torch.hub.load(
            str(ROOT), name, source="local", checkpoint=plugin_checkpoint, **kwargs
        )

    both = load("dino_vmf", which="student")
    assert isinstance(both.head, DINOHead)
    with torch.no_grad():
        pixels = expected["pixels"]
        torch.testing.assert_close(load("backbone")(pixels), expected["features"])
        torch.testing.assert_close(
            load("head", which="student")(expected["features"]), expected["y"]
        )
        torch.testing.assert_close(both(pixels), expected["y"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        torch.hub.load(str(ROOT), "backbone", source="local", checkpoint="nowhere.ckpt")
