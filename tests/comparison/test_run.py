"""A run from recipe to result.json: what it holds, when it is skipped, that a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ive, logsumexp

from dinovmf_plugin.comparison import run as run_module
from dinovmf_plugin.comparison.run import run_one
from dinovmf_plugin.comparison.shared import RunSettings
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.evaluation import workbench
from dinovmf_plugin.features.embedding import embed
from dinovmf_plugin.features.images import image_folder
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.recipes import Candidate
from dinovmf_plugin.training.config import parse_cfg
from dinovmf_plugin.training.curve import read_curve

VMF = Candidate("dino_multicrop", settings={"normalization": "vmf", "centering": "probability"})


@pytest.fixture(scope="module")
def finished(make_comparison: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings, result and folder of one uninterrupted run."""
    settings = RunSettings(make_comparison(tmp_path_factory.mktemp("whole")), VMF, 3)
    result = run_one(settings)
    (path,) = Path(settings.comparison.output_dir).glob("runs/*/*/result.json")
    return settings, result, path


def test_result_holds_what_tables_need(finished: Any) -> None:
    settings, result, path = finished
    stored = json.loads(path.read_text())
    assert stored["metrics"] == pytest.approx(result["metrics"])
    assert list(result["metrics"]) == [
        "knn_k1",
        "knn_k3",
        "linear_cls",
        "linear_dino",
        "few_shot_1 per class",
        "few_shot_2 per class",
    ]
    evaluation = result["evaluation"]
    assert result["metrics"]["knn_k1"] == evaluation["knn"]["k1"]["top1"]
    assert (
        result["metrics"]["linear_cls"] == evaluation["linear"]["features"]["cls"]["best"]["top1"]
    )
    assert result["baselines"]["untrained"].keys() == {"knn_k1", "knn_k3"}
    assert (result["normalization"], result["centering"]) == ("vmf", "probability")
    assert stored["recipe"]["seed"] == settings.seed == 3
    assert [record["epoch"] for record in result["curve"]] == [1, 2]
    # the last point of the curve and the evaluation see the same teacher and the same images
    assert result["curve"][-1]["top1"] == pytest.approx(result["metrics"]["knn_k1"])
    # kappa = |g| / tau, and |g| starts at 1
    temperature = result["recipe"]["method_kwargs"]["teacher_temperature"]
    kappa = result["prototypes"]["concentration"]["kappa_median"]
    assert kappa == pytest.approx(1 / temperature, rel=0.2)
    assert result["prototypes"]["usage"]["images"] == 12
    assert result["seconds"]["training"] > 0
    assert not list(path.parent.glob("features/*"))


def test_held_out_log_likelihood__is_that_of_the_density_written_out(finished: Any) -> None:
    settings, result, path = finished
    network = load_network(path.parent / result["checkpoint"], head=True)
    images = image_folder(settings.comparison.data.val_path, "data.val_path")
    y = embed(network, images, CenterCrop(37, 32), progress=False).y.double().numpy()
    w = network.prototypes.weight().detach().double().numpy()
    kappa = np.linalg.norm(w, axis=1) / result["recipe"]["method_kwargs"]["teacher_temperature"]
    order = y.shape[1] / 2 - 1
    log_bessel = np.log(ive(order, kappa)) + kappa
    log_c = order * np.log(kappa) - (order + 1) * math.log(2 * math.pi) - log_bessel
    cosine = y @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    density = logsumexp(log_c + kappa * cosine - math.log(len(w)), axis=1)
    found = result["prototypes"]["held_out_log_likelihood"]
    assert found == pytest.approx(density.mean(), abs=1e-3)


def test_baselines__are_measured_once_for_all_runs(finished: Any, make_comparison: Any) -> None:
    settings, result, path = finished
    (file,) = Path(settings.comparison.output_dir).glob("baselines/*.json")
    network = load_network(path.parent / result["checkpoint"], head=True)
    config = run_module._evaluation_config("any", settings.recipe(), settings, path.parent)
    stored = json.loads(file.read_text())
    stored["untrained"]["knn"]["k1"]["top1"] = 12.5  # only to be recognized
    before = file.read_text()
    file.write_text(json.dumps(stored))
    found = run_module._baselines(network, config, settings)
    assert run_module.flat_metrics(found["untrained"])["knn_k1"] == 12.5
    file.write_text(before)
    assert result["baselines"]["untrained"] == run_module.flat_metrics(
        run_module._baselines(network, config, settings)["untrained"]
    )


def test_evaluation_crops_are_those_of_the_backbone(finished: Any) -> None:
    _, result, _ = finished
    section = result["evaluation"]["knn"]["settings"]
    assert (section["resize"], section["crop_size"]) == (37, 32)  # 256 and 224, scaled to 32


def test_finished_run_is_skipped(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, result, _ = finished

    def train(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(run_module, "train", train)
    assert run_one(settings)["metrics"] == pytest.approx(result["metrics"])
    with pytest.raises(AssertionError, match="trained again"):
        run_one(RunSettings(settings.comparison, VMF, 4))


def test_killed_run_goes_on_and_ends_where_a_whole_one_does(
    finished: Any, make_comparison: Any, tmp_path: Path, killed_in_epoch_2: Any
) -> None:
    _, whole, _ = finished
    settings = RunSettings(make_comparison(tmp_path), VMF, 3)
    killed_in_epoch_2(lambda: run_one(settings))
    assert not list(tmp_path.glob("runs/*/*/result.json"))

    result = run_one(settings)
    assert result["resumed_from"].endswith("-ep0.ckpt")
    assert whole["resumed_from"] is None
    assert [r["epoch"] for r in result["curve"]] == [1, 2]
    seconds = [r["seconds"] for r in result["curve"]]
    assert seconds == sorted(seconds)  # the clock goes on
    losses = [[r["loss"] for r in found["curve"]] for found in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert result["metrics"] == pytest.approx(whole["metrics"])


def test_diverged_run_is_a_result(
    make_comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(make_comparison(tmp_path), Candidate("dino_multicrop"), 0, lr=1e6)
    result = run_one(settings)
    assert result["outcome"] == "diverged"
    assert "nan" in result["diverged"].lower()
    assert result["metrics"] == {}
    assert result["recipe"]["optimizer"]["lr"] == pytest.approx(1e6 * 4 / 256)
    monkeypatch.setattr(run_module, "train", None)
    assert run_one(settings)["outcome"] == "diverged"


def test_curve_survives_a_cut_line_and_a_repeated_epoch(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "loss": 4.0}, {"epoch": 2, "loss": 3.5}, {"epoch": 2, "loss": 3.0}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 3, "lo'
    (tmp_path / "curve.jsonl").write_text(text)
    assert [r["loss"] for r in read_curve(tmp_path)] == [4.0, 3.0]


@pytest.mark.parametrize(
    ("record", "knn", "outcome"),
    [
        ({"loss_over_log_k": 1.0, "student_entropy": math.log(64)}, 90.0, "uniform"),
        ({"loss_over_log_k": 0.5, "target_information_share": 0.02}, 90.0, "uniform"),
        ({"loss_over_log_k": 0.5, "target_information_share": 0.05}, 90.0, "information lost"),
        ({"teacher_entropy": 1.0, "batch_largest_win_share": 1.0}, 90.0, "one component"),
        ({"loss_over_log_k": 0.7, "teacher_entropy": 1.0}, 59.0, "below untrained"),
        ({"loss_over_log_k": 0.7, "teacher_entropy": 1.0}, 61.0, "trains"),
        ({"loss_over_log_k": None, "teacher_entropy": None}, 61.0, "trains"),
    ],
)
def test_outcome(record: dict[str, float | None], knn: float, outcome: str) -> None:
    from dinovmf_plugin.comparison.outcome import outcome_of

    result = {
        "diverged": None,
        "monitor": {"step": [{"target_information_share": 0.3}, record, record, record]},
        "metrics": {"knn_k10": knn},
        "baselines": {"untrained": {"knn_k10": 60.0}},
    }
    assert outcome_of(result, 64, 10) == outcome
    assert outcome_of({**result, "diverged": "nan"}, 64, 10) == "diverged"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"knn": {"ks": [0, 1]}}}, "evaluation.knn.ks"),
        ({"evaluation": {"knn": {"ks": [500]}}, "k": 500}, r"knn.ks=\[500\].*holds only 12 images"),
        (
            {"evaluation": {"knn": {"ks": [1, 500]}}, "k": 500},
            "k=500: data.train_path holds only 12",
        ),
        ({"evaluation": {"device": "cuda:99"}}, "device='cuda:99' cannot be used"),
        (
            {"evaluation": {"knn": {"feature": "nonsense"}}},
            "evaluation.knn.feature='nonsense' must be cls, ",
        ),
        ({"baselines": ["nonsense"]}, "baselines=.* must be a list of untrained or pixels"),
        (
            {"thresholds": [2.0]},
            "thresholds=.2.0. must be a list of numbers of at least -1 and below 1",
        ),
        ({"thresholds": []}, "thresholds=.. must be a list of .*, one at least"),
    ],
)
def test_what_the_evaluation_would_refuse__is_refused_before_training(
    make_comparison: Any, tmp_path: Path, monkeypatch: Any, changes: Any, message: str
) -> None:
    plain = make_comparison(tmp_path)
    evaluation = dict(plain.evaluation)
    for name, section in changes.pop("evaluation", {}).items():
        known = isinstance(section, dict)
        evaluation[name] = {**dict(evaluation.get(name) or {}), **section} if known else section
    monkeypatch.setattr(run_module, "train", lambda *_: pytest.fail("trained"))

    def compare() -> None:
        settings = dataclasses.replace(plain, evaluation=evaluation, **{"k": 1, **changes})
        run_one(RunSettings(settings, VMF, 3))

    with pytest.raises(ValueError, match=message):
        compare()


def test_prototypes__are_measured_on_the_features_of_knn__which_are_made_once(
    finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, result, path = finished
    passes: list[str] = []
    extract = workbench.extract_feature_set

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["name"])
        return extract(*args, **kwargs)

    monkeypatch.setattr(workbench, "extract_feature_set", counted)
    shared = dataclasses.replace(settings.comparison, evaluations=("knn",), baselines=())
    again = dataclasses.replace(settings, comparison=shared)
    checkpoint = str(path.parent / result["checkpoint"])
    found = run_module._evaluate(checkpoint, parse_cfg(settings.recipe()), again, tmp_path)
    assert sorted(passes) == ["train", "val"]
    assert found["prototypes"]["usage"] == result["prototypes"]["usage"]
