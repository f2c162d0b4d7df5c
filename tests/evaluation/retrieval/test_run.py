"""Retrieval from image files and a checkpoint to JSON, on a tiny set in the published layout."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinovmf_plugin.evaluation.retrieval import descriptors
from dinovmf_plugin.evaluation.retrieval.dataset import load_retrieval_set
from dinovmf_plugin.evaluation.retrieval.descriptors import DINO_SCALES, global_descriptor
from dinovmf_plugin.evaluation.retrieval.page import format_scores
from dinovmf_plugin.evaluation.retrieval.run import evaluate_retrieval
from dinovmf_plugin.evaluation.retrieval.scores import rank_database, revisited_scores
from tests.evaluation.retrieval.landmarks import SIDE, settings, vit


def pixels(path, box=None):
    image = Image.open(path).convert("RGB")
    if box is not None:
        image = image.crop(box)
    return image


def tensor(image):
    array = np.asarray(image, dtype=np.float64) / 255
    array = (array - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]


def test_global_descriptor__one_scale_is_timms_cls():
    model, images = vit(), torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = F.normalize(model.forward_features(images)[:, 0], dim=1)
        torch.testing.assert_close(global_descriptor(model, images), expected)


def test_global_descriptor__scales_are_averaged_before_the_norm():
    model, images = vit(), torch.randn(2, 3, 2 * SIDE, 2 * SIDE)
    with torch.no_grad():
        got = global_descriptor(model, images, (1.0, 0.5))
        half = images.reshape(2, 3, SIDE, 2, SIDE, 2).mean(dim=(3, 5))  # bilinear by 1/2
        small = model.forward_features(half)[:, 0]
        large = global_descriptor(model, images)  # a unit vector: recover its length below
        together = F.normalize(small, dim=1) * 0
        for i in range(2):
            basis = torch.stack([small[i], large[i]], dim=1)
            weights = torch.linalg.lstsq(basis, got[i, :, None]).solution
            assert (weights > 0).all()
            together[i] = (basis @ weights)[:, 0]
        torch.testing.assert_close(got, together, atol=1e-4, rtol=1e-4)
        three = global_descriptor(model, images[:1], DINO_SCALES)
        torch.testing.assert_close(three.norm(dim=1), torch.ones(1))
        both = global_descriptor(model, images, DINO_SCALES)
        torch.testing.assert_close(three, both[:1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="scales is empty"):
        global_descriptor(model, images, ())


def test_evaluate__equals_timm_on_the_same_files(tmp_path, data, checkpoint):
    """Square files of the network's own size, so that timm's own forward is the reference."""
    truth = load_retrieval_set(data.parent, "roxford5k")
    for name in truth.database + truth.queries:
        pixels(truth.image_path(name)).resize((SIDE, SIDE)).save(truth.image_path(name))
    results = evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    with torch.no_grad():
        features = [
            torch.cat(
                [vit().forward_features(tensor(pixels(truth.image_path(n))))[:, 0] for n in names]
            )
            for names in (truth.database, truth.queries)
        ]
    ranks = rank_database(*features)
    assert results["scores"] == revisited_scores(ranks, truth.ground_truth)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["scores"] == results["scores"]
    assert written["speed"]["database"]["computed"] == 12
    assert written["speed"]["database"]["seconds_per_image"] > 0
    assert set(written["average_precision"]) == set(truth.queries)
    assert written["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "out" / "rankings.png") as sheet:
        assert sheet.size == (11 * 124 + 4, 2 * 124 + 4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Retrieval on roxford5k: checkpoint" in page
    assert f"<td>{100 * results['scores']['hard']['mAP']:.1f}</td>" in page
    assert "DINO-vMF ViT-Base/16, paper" in page
    assert "data:image/jpeg;base64," in page
    assert "http" not in page  # self-contained
    assert format_scores(results).splitlines()[0].split() == [
        "roxford5k", "mAP", "mP@1", "mP@5", "mP@10",
    ]  # fmt: skip


def test_evaluate__multi_scale_and_boxes_change_what_they_should(tmp_path, data, checkpoint):
    def saved(out):
        return [
            np.load(tmp_path / out / "descriptors" / kind / "000000.npz")["features"]
            for kind in ("database", "queries")
        ]

    for out, change in (
        ("plain", {}),
        ("boxes", {"query_boxes": True}),
        ("scales", {"scales": [1.0, 0.5], "imsize": None}),
    ):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / out, **change))
    plain, boxes, scales = saved("plain"), saved("boxes"), saved("scales")
    assert (plain[0] == boxes[0]).all()
    assert not np.isclose(plain[1], boxes[1], atol=1e-6).all(axis=1).any()
    assert not np.isclose(plain[0], scales[0], atol=1e-6).all(axis=1).any()


def test_resume__finished_images_are_not_computed_again(tmp_path, data, checkpoint, monkeypatch):
    monkeypatch.setattr(descriptors, "_SHARD", 5)
    seen = []
    real = descriptors.global_descriptor

    def counting(model, images, scales):
        seen.append(1)
        if len(seen) == 3 + 11:  # three queries, then ten database images (two files) and one more
            raise KeyboardInterrupt
        return real(model, images, scales)

    monkeypatch.setattr(descriptors, "global_descriptor", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    again = evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    assert again["speed"]["queries"]["computed"] == 0
    assert again["speed"]["database"]["computed"] == 2
    assert len(seen) == 14 + 2
    fresh = evaluate_retrieval(settings(data, checkpoint, tmp_path / "fresh"))
    assert fresh["scores"] == again["scores"]
    with pytest.raises(ValueError, match="imsize was 32, is now 64"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", imsize=64))


def test_truncated_image__used_and_named(tmp_path, data, checkpoint):
    path = data / "jpg" / "bridge_000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    results = evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    assert results["speed"]["database"]["truncated"] == [7]


def test_baselines__untrained_by_name_but_not_pixels(tmp_path, data):
    name = "random:vit_tiny_patch16_224"
    results = evaluate_retrieval(settings(data, name, tmp_path / "out", show=0))
    assert results["checkpoint"]["checkpoint"] == "untrained vit_tiny_patch16_224 seed 0"
    assert not (tmp_path / "out" / "rankings.png").exists()
    with pytest.raises(ValueError, match="seed 0', is now 'untrained vit_tiny_patch16_224 seed 1"):
        evaluate_retrieval(settings(data, name, tmp_path / "out", seed=1))
    with pytest.raises(ValueError, match="checkpoint=pixels 32x32 has no patch tokens"):
        evaluate_retrieval(settings(data, "pixels", tmp_path / "pixels"))


def test_script__from_any_folder_and_bad_input_ends_in_one_sentence(
    tmp_path, data, checkpoint, monkeypatch, capsys
):
    script = str(Path(__file__).resolve().parents[3] / "scripts" / "retrieval.py")
    given = [f"checkpoint={checkpoint}", f"data_path={data.parent}", "imsize=32", "num_workers=1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *given, "output_dir=out", "scales=[1.0,0.7071]"])
    runpy.run_path(script, run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["scales"] == [1.0, 0.7071]
    assert format_scores(results) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    assert "error: output_dir=None must be set to a path\n" in capsys.readouterr().err


def test_foreign_output_folder__untouched(tmp_path, data, checkpoint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and has no settings.json"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


def test_another_picture_under_the_same_name__refused_with_the_key(tmp_path, data, checkpoint):
    evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
    path = data / "jpg" / "abbey_000000.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + content[-2:])
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(ValueError, match="results of other settings .*images_digest was"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out"))
