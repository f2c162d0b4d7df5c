"""Training and evaluations from archives and data sets: what the same images in folders give, to the bit."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from PIL import Image

from dinovmf_plugin.analysis.run import analyze
from dinovmf_plugin.analysis.settings import AnalysisSettings
from dinovmf_plugin.embeddings.run import embed_folder
from dinovmf_plugin.embeddings.settings import EmbedSettings
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.pretraining import pretrain
from dinovmf_plugin.runs.settings import read
from tests.small_demo import small_demo

datasets = pytest.importorskip("datasets")
wds = pytest.importorskip("webdataset")
h5py = pytest.importorskip("h5py")

SOURCES = ("folder", "tar", "wds", "hfds", "h5")


class PowerLoss(Exception):
    """The machine went away."""


class Losses(Callback):
    """The loss of every step, up to the last one."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.values = die_at, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(module.last_step.loss.item())
        if trainer.global_step == self.die_at:
            raise PowerLoss


def _write(root: Path, target: Path, part: str) -> None:
    files = [(path, label) for label in (0, 1) for path in sorted((root / "ab"[label]).iterdir())]
    with tarfile.open(target / f"{part}.tar", "w") as tar:
        tar.add(root, ".")
    with wds.TarWriter(str(target / f"{part}_wds.tar")) as writer:
        for row, (path, label) in enumerate(files):
            writer.write({"__key__": f"{row:03d}", "png": path.read_bytes(), "cls": label})
    with h5py.File(target / f"{part}.h5", "w") as h5:
        for path, _ in files:
            data = np.frombuffer(path.read_bytes(), dtype="uint8")
            h5.create_dataset(f"{path.parent.name}/{path.name}", data=data)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [{"bytes": path.read_bytes(), "path": None} for path, _ in files]
    rows = {"image": images, "label": [label for _, label in files]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(target / f"{part}_hf"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Source -> overrides that name the same images."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label in "ab":
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        _write(root / part, root, part)
    endings = {"folder": "", "tar": ".tar", "wds": "_wds.tar", "hfds": "_hf", "hfids": "_hf"}
    endings["h5"] = ".h5"
    return {
        source: [
            f"data.source={source}",
            *(f"data.{part}_path={root / part}{ending}" for part in ("train", "val")),
        ]
        for source, ending in endings.items()
    }


def _recipe(given: list[str], folder: Path, *overrides: str) -> Any:
    small = [
        f"checkpoint.dir={folder}",
        "max_epochs=2",
        "scheduler.warmup_epochs=1",
        "method_kwargs.num_prototypes=16",
        "auto_resume.enabled=True",
    ]
    return small_demo(*given, *small, *overrides)


@pytest.fixture(scope="module")
def straight(data: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses and checkpoint of the run on folders."""
    log = Losses()
    final = pretrain(_recipe(data["folder"], tmp_path_factory.mktemp("run")), [log])
    assert final is not None
    return log.values, final


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "folder"])
def test_pretraining__losses_weights_and_resume_of_the_folder_s_run(
    data, straight, tmp_path, source
):
    first, second = Losses(die_at=4), Losses()
    with pytest.raises(PowerLoss):
        pretrain(_recipe(data[source], tmp_path), [first])
    final = pretrain(_recipe(data[source], tmp_path), [second])
    losses, expected = straight
    assert first.values[:3] + second.values == losses  # it goes on from the end of the first epoch
    assert first.values[3] == losses[3]
    ours, theirs = (torch.load(p, weights_only=True)["state_dict"] for p in (final, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stream__trains_resumes_and_is_evaluated(data, tmp_path):
    whole, first, second = Losses(), Losses(die_at=4), Losses()
    with pytest.warns(UserWarning, match="is a stream, which cannot seek"):
        pretrain(_recipe(data["hfids"], tmp_path / "whole"), [whole])
    with pytest.raises(PowerLoss):
        pretrain(_recipe(data["hfids"], tmp_path / "cut"), [first])
    pretrain(_recipe(data["hfids"], tmp_path / "cut"), [second])
    assert first.values[:3] + second.values == whole.values


def _knn(checkpoint: Path, given: list[str], folder: Path) -> dict[str, Any]:
    more = [
        f"checkpoint={checkpoint}",
        f"output_dir={folder}",
        "knn.ks=[1,3]",
        "knn.resize=36",
        "knn.crop_size=32",
        "data.num_workers=0",
        "device=cpu",
        "progress=false",
    ]
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return evaluate_one(compose("knn", overrides=[*given, *more]), "knn")


def _features(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((folder / "features").glob("*"))
    found = {path.name.split("-")[0].split("_")[0]: load_file(path) for path in files}
    return {f"{part} {key}": value for part, all_ in found.items() for key, value in all_.items()}


@pytest.mark.parametrize("source", ["tar", "wds", "hfds", "hfids", "h5"])
def test_knn__the_folder_s_features_and_scores(data, straight, tmp_path, source):
    expected = _knn(straight[1], data["folder"], tmp_path / "folder")
    found = _knn(straight[1], data[source], tmp_path / source)
    ours, theirs = _features(tmp_path / source), _features(tmp_path / "folder")
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 4
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (found["k1"], found["k3"]) == (expected["k1"], expected["k3"])


@pytest.mark.parametrize("source", ["tar", "hfds"])
def test_analysis__the_folder_s_measurements_and_pictures(data, straight, tmp_path, source):
    def run(name: str) -> dict[str, Any]:
        more = [
            f"checkpoint={straight[1]}",
            f"output_dir={tmp_path / name}",
            "data.num_workers=0",
            "attention.images=1",
            "device=cpu",
        ]
        with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
            cfg = compose("analyze", overrides=[*data[name], *more])
        return analyze(read(AnalysisSettings, cfg))

    ours, theirs = run(source), run("folder")
    for key in ("utilization", "usage", "precision", "mixture", "images"):
        assert ours[key] == theirs[key], key
    pages = [(tmp_path / name / "gallery.html").read_text() for name in (source, "folder")]
    pictures = [[p.split('"')[0] for p in page.split('src="data:')[1:]] for page in pages]
    assert pictures[0] == pictures[1] != []
    table = (tmp_path / source / "images.csv").read_text()
    path = next(item.split("=", 1)[1] for item in data[source] if "train_path" in item)
    assert f"{path}/{'a/0.png' if source == 'tar' else 'train/0'}," in table


def test_embed__the_folder_s_rows(data, straight, tmp_path):
    tables = {}
    for source in ("folder", "tar"):
        path = next(item.split("=", 1)[1] for item in data[source] if "train_path" in item)
        settings = {
            "checkpoint": str(straight[1]),
            "output_dir": str(tmp_path / source),
            "data": {"path": path, "source": source, "num_workers": 0},
            "format": "npy",
            "device": "cpu",
            "progress": False,
        }
        embed_folder(read(EmbedSettings, settings))
        files = sorted((tmp_path / source / "table").glob("*.npy"))
        tables[source] = {file.name: np.load(file) for file in files}
    assert tables["tar"].keys() == tables["folder"].keys() >= {"features.npy", "path.npy"}
    for name, values in tables["folder"].items():
        np.testing.assert_array_equal(tables["tar"][name], values)
    settings["data"]["label_key"] = "kind"
    with pytest.raises(ValueError, match=r"data\.label_key='kind' is not used"):
        read(EmbedSettings, settings)
