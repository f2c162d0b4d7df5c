"""The demo from pictures to page, on forty tiny pictures: results, report, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image

from dinovmf_plugin.data import demo as demo_data
from dinovmf_plugin.demo.run import run_demo
from dinovmf_plugin.demo.training import TrainingFailedError, train_all

OVERRIDES = [
    "max_epochs=2",
    "data.num_workers=1",
    "optimizer.batch_size=8",
    "scheduler.warmup_epochs=0",
    "method_kwargs.num_prototypes=32",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=8",
    "method_kwargs.monitor_every=2",
    "+enable_progress_bar=False",
    "+enable_model_summary=False",
]


def _picture(index: int) -> Image.Image:
    """Stripes, upright in every other picture, on noise."""
    noise = np.random.default_rng(index).integers(0, 60, (24, 24))
    stripes = (np.arange(24) // 3 % 2 * 150)[None].repeat(24, axis=0)
    pixels = noise + (stripes if index % 2 else stripes.T)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(autouse=True)
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["across", "down"] * 20
    pictures = demo_data.Pictures(labels, [f"{n:02d}" for n in range(40)], _picture)
    entry = demo_data.DemoDataset("numpy", "none at all", "stripes", lambda: pictures)
    monkeypatch.setitem(demo_data.DATASETS, "stripes", entry)


def _settings(
    folder: Path, *more: str, methods: str = "[dino_multicrop,dino_vmf]", processes: int = 1
) -> Any:
    overrides = ",".join(f"'{text}'" for text in [*OVERRIDES, *more])
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return compose(
            "demo",
            overrides=[
                f"output_dir={folder}",
                "dataset=stripes",
                f"processes={processes}",
                "fraction=1.0",
                f"methods={methods}",
                f"overrides=[{overrides}]",
                "knn.ks=[1,5,20]",
                "knn.k=5",
                "knn.every=1",
            ],
        )


def test_demo__results_and_report(tmp_path, capsys):
    folder = tmp_path / "demo"
    returned = run_demo(_settings(folder, processes=2))
    results = json.loads((folder / "results.json").read_text())
    assert results["images"] == {"train": 30, "val": 10}
    assert set(results["baselines"]) == {"pixels", "untrained"}
    assert results["baselines"]["pixels"]["k5"]["top1"] == 100  # stripes are no riddle
    floor = results["baselines"]["untrained"]["k5"]["top1"]
    for name in ("dino_multicrop", "dino_vmf"):
        method = results["methods"][name]
        assert list(method["knn"]) == ["k1", "k5", "k20"]
        assert method["gain_over_untrained"] == pytest.approx(method["knn"]["k5"]["top1"] - floor)
        assert method["knn"]["k5"]["top1"] == pytest.approx(method["epochs"][-1]["top1"], abs=0.01)
        assert [record["epoch"] for record in method["epochs"]] == [1, 2]
        assert (folder / method["checkpoint"]).is_file()
        assert 0 < method["components"]["used"] <= method["components"]["components"] == 32
        assert method["target_information"] == method["monitor"]["step"][-1]["target_information"]
        (first, *_), epochs = (method["monitor"][kind] for kind in ("step", "epoch"))
        assert 0 < first["teacher_entropy"] < np.log(32)
        assert {"kappa_median", "unique_prototypes", "usage_perplexity"} <= set(epochs[-1])
    cells = [
        [results["methods"][m]["settings"][key] for key in ("normalization", "centering")]
        for m in ("dino_multicrop", "dino_vmf")
    ]
    assert cells == [["none", "logit"], ["vmf", "probability"]]
    assert returned["seconds"] == results["seconds"]

    page = (folder / "report.html").read_text()
    for text in (
        "untrained",
        "pixels",
        "none at all",
        "Nearest neighbors: dino_vmf",
        "Concentrations",
        "Does it learn?",
        "precise components: dino_vmf",
    ):
        assert text in page
    assert page.count("data:image") > 20  # charts, crops and neighbors
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    printed = capsys.readouterr().out
    assert f"{results['methods']['dino_vmf']['gain_over_untrained']:+.1f} points" in printed

    with pytest.raises(ValueError, match=r"holds results of other settings \(seed was 0, is now 1"):
        run_demo({**_settings(folder), "seed": 1})


def test_interrupted_demo__goes_on_and_shows_the_whole_run(tmp_path, killed_in_epoch_2):
    settings = _settings(tmp_path / "demo", methods="[dino_vmf]")
    killed_in_epoch_2(lambda: run_demo(settings))
    method = run_demo(settings)["methods"]["dino_vmf"]
    assert [r["epoch"] for r in method["epochs"]] == [1, 2]
    assert method["seconds"] >= method["epochs"][0]["seconds"]
    steps = [r["step"] for r in method["monitor"]["step"]]
    assert steps == sorted(set(steps))
    assert steps[0] <= 2 < steps[-1]  # before and after the interruption


def test_untrained__is_where_every_method_starts(tmp_path):
    """With a learning rate of 0 nobody gains anything."""
    still = ["optimizer.lr=0.0", "scheduler.min_lr=0.0", "max_epochs=1"]
    results = run_demo(_settings(tmp_path / "demo", *still))
    for method in results["methods"].values():
        assert method["gain_over_untrained"] == 0
        assert method["knn"] == results["baselines"]["untrained"]


def test_failed_process__tells_its_last_words_and_ends_the_others(tmp_path):
    bad = OmegaConf.create({"method": "dinosaur", "name": "x", "seed": 0})
    options: dict[str, Any] = {"every": 1, "k": 1, "temperature": 0.07, "processes": 2}
    with pytest.raises(TrainingFailedError, match=r"ended with status [12]:"):
        train_all({"one": bad, "two": bad}, tmp_path, **options)
    assert (tmp_path / "one.log").is_file()


def test_unknown_method__named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"methods=\['dinosaur'\] must be a list of .*dino_vmf"):
        run_demo(_settings(tmp_path / "demo", methods="[dinosaur]"))
    with pytest.raises(ValueError, match="processes=0 must be a whole number of at least 1"):
        run_demo(_settings(tmp_path / "demo", processes=0))
    assert not (tmp_path / "demo").exists()
