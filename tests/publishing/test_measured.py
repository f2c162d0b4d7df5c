"""Numbers in the model card: those of the exported weights, and of no others."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.checkpoints.layouts import read_weights
from dinovmf_plugin.checkpoints.transfer import export_weights
from dinovmf_plugin.evaluation.runner import evaluate, evaluate_one
from dinovmf_plugin.publishing.cli import export_main
from dinovmf_plugin.publishing.measured import measurements
from dinovmf_plugin.runs.files import file_digest


@pytest.fixture
def photos(tmp_path):
    """Two classes of noise, to train and to evaluate on."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def _config(run, photos, output):
    return {
        "checkpoint": str(run.path),
        "output_dir": str(output),
        "device": "cpu",
        "data": {
            "train_path": str(photos / "train"),
            "val_path": str(photos / "val"),
            "num_workers": 0,
        },
        "knn": {"ks": [1, 3], "crop_size": 32, "resize": 36},
        "baselines": ["untrained"],
    }


def test_evaluations_beside__are_in_the_card(stored_run, tmp_path, photos):
    run = stored_run()
    result = evaluate(_config(run, photos, run.folder / "evaluation"), ["knn"])
    flat = evaluate_one(_config(run, photos, tmp_path / "elsewhere"), "knn")
    found = measurements(read_weights(run.path))
    (one,) = found
    assert one.table.header == ["kNN top-1 (%)", "k = 1", "k = 3"]
    assert [row[0] for row in one.table.rows][::2] == ["these weights", "untrained"]
    wanted = [f"{result['knn'][k]['top1']:.2f}" for k in ("k1", "k3")]
    assert one.table.rows[0][1:] == wanted
    assert one.source.startswith("`results.json`, dinovmf_plugin ")
    assert one.source.endswith("images of `val`")
    assert str(tmp_path) not in one.source
    more = measurements(read_weights(run.path), results=[tmp_path / "elsewhere"])
    assert [m.source.split(",")[0] for m in more] == ["`results.json`", "`knn.json`"]
    assert more[1].table.rows[0][1:] == [f"{flat[k]['top1']:.2f}" for k in ("k1", "k3")]

    assert export_main([str(run.path), "--output", str(tmp_path / "e")]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert one.table.markdown() in card
    assert "No evaluation" not in card
    # the student is another network of the same file; other bytes are other weights
    assert not measurements(replace(read_weights(run.path), which="student"))
    with open(run.path, "ab") as file:
        file.write(b"\0")
    assert not measurements(read_weights(run.path))
    with pytest.raises(ValueError, match=r"holds no results of last\.ckpt as it is now"):
        measurements(read_weights(run.path), results=[tmp_path / "elsewhere" / "knn.json"])
    with pytest.raises(FileNotFoundError, match="--results absent does not exist"):
        measurements(read_weights(run.path), results=["absent"])


def _write(run, name, content):
    record = {"checkpoint": {"sha256": file_digest(run.path), "which": "teacher"}}
    versions = {"versions": {"dinovmf_plugin": "0.1.0"}, "settings": {}}
    (run.folder / name).write_text(json.dumps({**record, **versions, **content}))


def test_retrieval_video_and_finetuning__have_their_tables(stored_run):
    run = stored_run()
    scores = {name: {"mAP": value} for name, value in (("easy", 0.5), ("medium", 0.25))}
    _write(run, "a.json", {"task": "retrieval", "dataset": "roxford5k", "scores": scores})
    means = {"J&F-Mean": 0.6, "J-Mean": 0.5, "F-Mean": 0.7}
    _write(
        run,
        "b.json",
        {"task": "video segmentation", "split": "val", "scores": means, "copy_first_mask": means},
    )
    best = {"top1": 81.0, "mean_per_class": 80.0, "lr": 0.001, "epoch": 3}
    _write(run, "c.json", {"runs": [], "best": best, "settings": {"dataset": None}})
    _write(run, "d.1.json", {"task": "retrieval", "dataset": "set aside", "scores": scores})
    mixture = {
        "checkpoint": None,
        "which": "teacher",
        "settings": {"sha256": {"checkpoint": file_digest(run.path)}},
        "num_prototypes": 24,
        "void_set": {"threshold": 0.9},
        "utilization": {"greedy": {"0.9": {"unique": 20}}},
        "usage": {"winning_prototypes": 15, "usage_perplexity": 12.5},
    }
    _write(run, "e.json", mixture)
    tables = [one.table for one in measurements(read_weights(run.path))]
    retrieval, video, tuned, analysis = tables
    assert analysis.rows == [["these weights", 24, 20, 15, 12.5]]
    assert retrieval.header == ["roxford5k, mAP (%)", "easy", "medium"]
    assert retrieval.rows == [["these weights", "50.00", "25.00"]]
    assert video.rows[0] == ["these weights", "60.00", "50.00", "70.00"]
    assert tuned.rows[0][:2] == ["these weights", "81.00"]


def test_results_of_another_form__are_one_sentence(stored_run, tmp_path):
    run = stored_run()
    _write(run, "a.json", {"task": "retrieval"})
    with pytest.raises(
        ValueError, match=r"a\.json holds results of this checkpoint in another form"
    ):
        export_weights(run.path, tmp_path / "e", measure=measurements)
    assert not (tmp_path / "e").exists()


def test_what_the_run_recorded__at_the_step_of_the_checkpoint(stored_run):
    run = stored_run()
    monitor = {"kind": "epoch", "usage_perplexity": 10.5, "examined_prototypes": 24.0}
    lines = [
        {**monitor, "epoch": 5, "step": 1000, "unique_prototypes": 9.0},
        {**monitor, "epoch": 6, "step": 1234, "unique_prototypes": 20.0},
        {**monitor, "epoch": 7, "step": 1400, "unique_prototypes": 9.0},
    ]
    curve = [{"epoch": e, "seconds": 1, "loss": 5.0 - e, "top1": 10.0 * e} for e in (6, 7, 8)]
    (run.folder / "monitor.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run.folder / "curve.jsonl").write_text("\n".join(map(json.dumps, curve)))
    (one,) = measurements(read_weights(run.path))
    told = dict(one.table.rows)
    assert one.table.header[0] == "while training, step 1,234"
    assert (told["loss of the epoch"], told["kNN top-1 (%)"]) == (-2.0, "70.00")
    assert (told["unique components"], told["of examined"]) == (20, 24)
