"""scripts/analyze.py end to end on a plugin checkpoint and an official one; its tables and pages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from sklearn.neighbors import KNeighborsClassifier

from dinovmf_plugin.analysis.gallery import component_sheets
from dinovmf_plugin.analysis.measurements import knn_correct, score_images
from dinovmf_plugin.analysis.run import AnalysisSettings, analyze, format_analysis
from dinovmf_plugin.analysis.tables import save_table
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.embedding import assign, embed
from dinovmf_plugin.features.images import ImageSet, image_folder
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.mixture.model import VMFMixture, prototype_mixture
from dinovmf_plugin.mixture.utilization import utilization
from dinovmf_plugin.runs.settings import read

CROP = CenterCrop(resize=18, size=16)


def configured(*overrides):
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        cfg = compose("analyze", overrides=list(overrides))
    return read(AnalysisSettings, cfg)


class Checker(HTMLParser):
    """Balanced tags, and no reference that leaves the file."""

    void = frozenset({"meta", "img", "source", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.images = [], 0

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("src", "srcset", "href"):
                assert value.startswith(("data:", "#")), value[:80]
        self.images += tag == "img"
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path):
    checker = Checker()
    text = path.read_text()
    checker.feed(text)
    assert checker.open == []
    assert "prefers-color-scheme: dark" in text
    return checker.images, text


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory, plugin_checkpoint, official_checkpoint, image_folders):
    folder = tmp_path_factory.mktemp("analysis") / "out"
    settings = configured(
        f"checkpoint={plugin_checkpoint}",
        f"data.train_path={image_folders}/train",
        f"data.val_path={image_folders}/val",
        f"output_dir={folder}",
        f"compare={{DINO: {official_checkpoint}}}",
        "name=ours",
        "data.num_workers=0",
        "utilization.thresholds=[0.5,0.9]",
        "precision.bins=2",
        "precision.k=3",
        "attention.images=2",
        "gallery.outliers=5",
        "device=cpu",
    )
    return settings, analyze(settings), folder


def test_json__holds_what_the_parts_compute(analyzed, plugin_checkpoint, image_folders):
    _, result, folder = analyzed
    stored = json.loads((folder / "analysis.json").read_text())
    assert stored.keys() == result.keys()
    model = load_network(plugin_checkpoint, head=True)
    images = image_folder(image_folders / "train", "data.train_path", labeled="auto")
    y = embed(model, images, CROP, num_workers=0, progress=False).y
    model.head.requires_grad_(False)
    sweep = utilization(model.prototypes.directions(), [0.5, 0.9])
    assert stored["utilization"]["greedy"] == {str(t): found for t, found in sweep.items()}
    wins = torch.bincount(model.prototypes(y, 0.05).argmax(-1), minlength=24)
    assert stored["usage"]["winning_prototypes"] == int((wins > 0).sum())
    assert stored["void_set"]["size"] == sweep[0.9]["largest"]
    mean = torch.nn.functional.cosine_similarity(
        model.prototypes.directions()[stored["void_set"]["representative"]], y.mean(0), dim=0
    )
    assert stored["void_set"]["cosine_with_mean"] == pytest.approx(float(mean), abs=1e-5)
    drift = torch.nn.functional.cosine_similarity(model.prototypes.directions(), y.mean(0)[None])
    median = float(drift.quantile(0.5))
    assert stored["drift"]["data_cosine_median"] == pytest.approx(median, abs=1e-5)
    likelihood = prototype_mixture(model.prototypes, 0.05).log_likelihood(y).mean()
    assert stored["mixture"]["train"]["log_likelihood"] == pytest.approx(
        float(likelihood), abs=1e-4
    )
    assert stored["images"] == {"train": 12, "val": 8}
    assert sum(part["images"] for part in stored["precision"]["bins"]) == 8
    assert (stored["normalization"], stored["temperature"]) == ("vmf", 0.05)
    other = stored["comparison"]["DINO"]
    assert (other["normalization"], other["temperature"]) == ("none", 0.06)
    assert other["utilization"] == stored["utilization"]  # the same directions
    assert {"torch", "timm"} <= stored["versions"].keys()
    assert "ours" in format_analysis(stored)


def test_tables__have_a_row_per_image_and_per_component(analyzed):
    _, result, folder = analyzed
    images = list(csv.DictReader((folder / "images.csv").open()))
    assert [row["set"] for row in images] == ["train"] * 12 + ["val"] * 8
    assert {row["class"] for row in images} == {"red", "blue"}
    ranked = sorted(images, key=lambda row: int(row["outlier_rank"]))
    assert [int(row["outlier_rank"]) for row in ranked] == list(range(1, 21))
    values = [float(row["log_likelihood"]) for row in ranked]
    assert values == sorted(values)
    components = list(csv.DictReader((folder / "components.csv").open()))
    assert len(components) == 24
    assert sum(int(row["images"]) for row in components) == 12
    for row in components:
        members = [x for x in images if x["set"] == "train" and x["component"] == row["component"]]
        assert int(row["images"]) == len(members)
        if members:
            shares = [sum(x["class"] == name for x in members) for name in ("red", "blue")]
            assert float(row["purity"]) == pytest.approx(max(shares) / len(members))


def test_pages__are_complete_and_self_contained(analyzed):
    _, result, folder = analyzed
    images, text = check_page(folder / "analysis.html")
    assert result["mixture"]["train"]["components_used"] <= 8
    # 7 charts, every training image in a sheet (at most 10 each), 2 x 5 ranked, 2 attention sheets
    assert images == 7 + 12 + 10 + 2
    assert f"{result['utilization']['greedy']['0.9']['unique']}</b>" in text
    images, _ = check_page(folder / "gallery.html")
    assert images == 12 + 10
    assert sorted(p.name for p in (folder / "figures").iterdir()) == sorted(
        f"{name}.svg"
        for name in (
            "circle",
            "concentration",
            "likelihood",
            "normalizer",
            "normalizer_error",
            "precision",
            "utilization",
        )
    )
    assert [str(p) for p in result["attention"]] == sorted(
        f"attention/{p.name}" for p in (folder / "attention").iterdir()
    )


def test_sheets__join_the_copies_of_a_component(image_folders):
    images = image_folder(image_folders / "train", "data.train_path", labeled="auto")
    mixture = VMFMixture(torch.eye(3)[[0, 1, 0, 2]], torch.full((4,), 50.0), torch.zeros(4))
    y = torch.eye(3)[[0] * 3 + [1] * 4 + [0] * 5] + 0.01 * torch.arange(12.0)[:, None]
    scored, _ = score_images(mixture, [(images, y)])
    groups = torch.tensor([0, 1, 0, 2])
    first, second = component_sheets(scored[0], groups, components=9, images=5, size=16)
    assert (first.title, second.title) == ("Component 0 and 1 copies", "Component 1")
    assert first.note.startswith("8 images · κ 50.0 · 62% red")  # 3 blue, 5 red
    assert [len(first.pictures), len(second.pictures)] == [5, 4]
    # the closest to the mean direction first: the noise grows with the index
    assert [p.title.split("\n")[0] for p in first.pictures][:3] == [
        images.path(i) for i in (0, 1, 2)
    ]


def test_output_folder__is_not_mixed_with_other_settings(analyzed):
    settings, _, folder = analyzed
    changed = AnalysisSettings(**{**vars(settings), "weights": "uniform"})
    with pytest.raises(ValueError, match="weights"):
        analyze(changed)
    assert json.loads((folder / "analysis.json").read_text())["mixture"]["weights"] == "model"


def test_official_checkpoint__and_a_plain_folder(tmp_path, official_checkpoint, image_folders):
    settings = configured(
        f"checkpoint={official_checkpoint}",
        f"data.train_path={image_folders}/flat",
        f"output_dir={tmp_path}/out",
        "data.num_workers=0",
        "utilization.thresholds=[0.9]",
        "utilization.components=false",
        f"attention.path={image_folders}/flat",
        "weights=center",
        "table=parquet",
    )
    result = analyze(settings)
    assert "skipped" in result["precision"]
    assert "components" not in result["utilization"]
    assert len(result["attention"]) == 3
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out" / "images.parquet").to_pydict()
    assert len(table["path"]) == 3
    assert set(table["class"]) == {""}
    images, _ = check_page(tmp_path / "out" / "analysis.html")
    assert images == 6 + 3 + 2 * 3 + 3


@pytest.mark.parametrize(
    ("name", "table"), [(b"L" * 248 + b".png", "parquet"), (b"caf\xe9.png", "csv")]
)
def test_legal_file_names__long_or_no_utf8__are_analyzed(
    tmp_path, official_checkpoint, image_folders, name, table
):
    """252 bytes are legal; a temporary file named after one is not, nor a map with its index before it."""
    shutil.copytree(image_folders / "flat", tmp_path / "flat")
    first = sorted((tmp_path / "flat").iterdir())[0]
    os.rename(first, os.fsencode(tmp_path / "flat") + b"/" + name)
    options = (
        f"checkpoint={official_checkpoint}",
        f"data.train_path={tmp_path}/flat",
        "data.num_workers=0",
        "utilization.components=false",
        f"attention.path={tmp_path}/flat",
    )
    result = analyze(configured(*options, f"output_dir={tmp_path}/out", f"table={table}"))
    assert len(result["attention"]) == 3
    assert (tmp_path / "out" / "analysis.html").is_file()
    if table == "csv":
        with pytest.raises(ValueError, match=r"table=parquet cannot hold the file name .*caf\\xe9"):
            analyze(configured(*options, f"output_dir={tmp_path}/other", "table=parquet"))
        assert not (tmp_path / "other").exists()


def test_assign__is_the_arg_max_of_the_model(plugin_checkpoint):
    model = load_network(plugin_checkpoint, head=True)
    y = torch.nn.functional.normalize(torch.randn(600, 8), dim=-1)
    best = model.prototypes(y, 0.05).topk(2, dim=-1)
    expected = best.indices[:, 0]
    assert torch.equal(assign(model.prototypes, y, 0.05), expected)
    # the mixture has exact normalizers, the layer those of the expansion: 0.006 apart at p = 8
    clear = best.values[:, 0] - best.values[:, 1] > 0.02
    assert clear.sum() > 560
    assert torch.equal(make_mixture(model, "model").assign(y)[clear], expected[clear])
    center = make_mixture(model, "center").log_weights
    torch.testing.assert_close(center, torch.linspace(-5, 0, 24).double().log_softmax(0))


def test_knn_correct__equals_sklearn():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(80, 6)), rng.normal(size=(40, 6))
    labels, truth = rng.integers(0, 3, 80), rng.integers(0, 3, 40)
    judge = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank, labels)
    tensors = [torch.from_numpy(x) for x in (bank, labels, queries, truth)]
    found = knn_correct(*tensors, k=10, temperature=0.07)
    assert found.tolist() == (judge.predict(queries) == truth).tolist()


def test_validation_classes__follow_the_training_set(image_folders, tmp_path):
    train = image_folder(image_folders / "train", "data.train_path", labeled="auto")
    assert train.classes == ("blue", "red")
    (tmp_path / "val" / "red").mkdir(parents=True)
    source = image_folders / "val" / "red" / "0.png"
    (tmp_path / "val" / "red" / "x.png").write_bytes(source.read_bytes())
    val = image_folder(tmp_path / "val", "data.val_path", classes=train.classes, labeled="auto")
    assert isinstance(val, ImageSet)
    assert (val.name, val.labels.tolist(), val.class_of(0)) == ("val", [1], "red")
    with pytest.raises(ValueError, match="'red'"):
        image_folder(tmp_path / "val", "data.val_path", classes=("blue", "green"), labeled="auto")


def test_unreadable_images__are_named_or_left_out(image_folders, tmp_path):
    (tmp_path / "good.png").write_bytes((image_folders / "val" / "red" / "0.png").read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=re.escape("bad.jpg")):
        image_folder(tmp_path, "data.train_path", labeled="auto")
    with pytest.warns(UserWarning, match="1 unreadable"):
        kept = image_folder(tmp_path, "data.train_path", skip_unreadable=True, labeled="auto")
    assert kept.path(0).endswith("good.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere", "data.train_path", labeled="auto")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "checkpoint=None"),
        (["data.train_path=null"], "data.train_path=None"),
        (["which=both"], "which='both'"),
        (["weights=equal"], "weights='equal'"),
        (["table=xlsx"], "table='xlsx'"),
        (["utilization.thresholds=[1.0]"], r"thresholds=\[1.0\]"),
        (["precision.bins=0"], "precision.bins=0"),
        (["precision.temperature=0"], "precision.temperature=0"),
        (["gallery.size=2"], "gallery.size=2"),
        (["data.batch_size=0"], "data.batch_size=0"),
        (["attention.images=-1"], "attention.images=-1"),
    ],
)
def test_bad_settings__are_named_before_anything_is_read(overrides, words):
    given = ["checkpoint=x.ckpt", "output_dir=out", "data.train_path=y"] if overrides else []
    with pytest.raises(ValueError, match=words):
        configured(*given, *overrides)


def test_unknown_keys__are_refused():
    given = {"checkpoint": "x", "output_dir": "y", "data": {"train_path": "z"}}
    with pytest.raises(ValueError, match=r"gallery\.rows is no known key: known keys are"):
        read(AnalysisSettings, given | {"gallery": {"rows": 3}})
    with pytest.raises(ValueError, match="checkpiont is no known key: did you mean checkpoint?"):
        read(AnalysisSettings, {"checkpiont": "x"})
    with pytest.raises(ValueError, match=r"utilization\.thresholds=0\.9 must be a list of numbers"):
        read(AnalysisSettings, given | {"utilization": {"thresholds": 0.9}})


def test_bad_checkpoint__does_not_claim_the_folder(tmp_path, image_folders):
    settings = configured(
        f"checkpoint={tmp_path}/none.ckpt",
        f"data.train_path={image_folders}/train",
        f"output_dir={tmp_path}/out",
    )
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        analyze(settings)
    assert not (tmp_path / "out").exists()


def test_tables__refuse_ragged_columns(tmp_path):
    with pytest.raises(ValueError, match="length"):
        save_table({"a": [1, 2], "b": [1]}, tmp_path, "x", "csv")
    with pytest.raises(ValueError, match="table='xls'"):
        save_table({"a": [1]}, tmp_path, "x", "xls")
