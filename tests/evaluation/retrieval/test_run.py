"""Retrieval from image files and a checkpoint to JSON, on a tiny set in the published layout."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from timm.models import VisionTransformer
from torch.nn import functional as F

from dinovmf_plugin.evaluation.retrieval import descriptors
from dinovmf_plugin.evaluation.retrieval.dataset import load_retrieval_set, read_image
from dinovmf_plugin.evaluation.retrieval.descriptors import DINO_SCALES, global_descriptor
from dinovmf_plugin.evaluation.retrieval.page import format_scores
from dinovmf_plugin.evaluation.retrieval.run import evaluate_retrieval
from dinovmf_plugin.evaluation.retrieval.scores import rank_database, revisited_scores
from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
from dinovmf_plugin.runs.reference import default_values
from dinovmf_plugin.runs.settings import read

SIDE = 32
PLACES = ("abbey", "bridge", "castle")


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0
    )
    torch.nn.init.normal_(model.cls_token)
    with torch.no_grad():  # at timm's initial scale the CLS token hardly sees the image
        for block in model.blocks:
            for weight in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight):
                weight.mul_(5)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def picture(rng, place, size):
    """A landmark: blocks of its own colours, with noise."""
    blocks = np.random.default_rng(place).integers(0, 256, (4, 4, 3))
    pixels = np.asarray(Image.fromarray(blocks.astype(np.uint8)).resize(size, 0), dtype=float)
    return Image.fromarray((pixels + rng.normal(0, 30, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def data(tmp_path):
    """4 images of each of 3 places, one query each; sizes differ."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "sets" / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    names, truths = [], []
    for place, name in enumerate(PLACES):
        for number in range(4):
            names.append(f"{name}_{number:06d}")
            size = [(32, 32), (48, 36), (30, 50), (64, 64)][number]
            picture(rng, place, size).save(folder / "jpg" / f"{names[-1]}.jpg", quality=95)
        picture(rng, place, (64, 48)).save(folder / "jpg" / f"{name}_query.jpg", quality=95)
        own = np.arange(4 * place, 4 * place + 4)
        truths.append(
            {"bbx": [8.2, 4.0, 40.0, 36.0], "easy": own[:2], "hard": own[2:3], "junk": own[3:]}
        )
    content = {"imlist": names, "qimlist": [f"{n}_query" for n in PLACES], "gnd": truths}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    return folder


def settings(data, weights, out, **changes):
    given = {
        "checkpoint": weights if weights is None else str(weights),
        "data_path": str(data.parent),
        "output_dir": str(out),
    }
    given |= {"imsize": SIDE, "device": "cpu", "num_workers": 0, "show": 2}
    return read(RetrievalSettings, given | changes)


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


def test_read_image__box_keeps_the_scale_of_the_whole_image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)).save(path)
    assert read_image(path, 50)[0].size == (50, 25)
    assert read_image(path, 50, (10.0, 20.0, 90.0, 60.0))[0].size == (20, 10)
    assert read_image(path, 400)[0].size == (200, 100)
    assert read_image(path, 400, (10.0, 20.0, 90.0, 60.0))[0].size == (80, 40)
    assert read_image(path, None)[0].size == (200, 100)
    with pytest.raises(ValueError, match="lies outside the image"):
        read_image(path, 50, (200.0, 0.0, 210.0, 5.0))
    path.write_text("no image")
    with pytest.raises(ValueError, match="a.png cannot be read as an image"):
        read_image(path, 50)


def change_truth(data, change):
    path = data / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["qimlist"].append("nowhere"), "4 query images, but 3 entries in gnd"),
        (lambda c: c["gnd"][1].pop("hard"), r"gnd of query 1 \(bridge_query\) has no 'hard'"),
        (lambda c: c["gnd"][0].update(easy=[12]), "easy names image 12, but imlist has 12"),
        (lambda c: c["gnd"][0].update(junk=[0]), "lists an image twice"),
        (lambda c: c["gnd"][0].update(easy=[0.5]), "easy must be whole numbers"),
        (lambda c: c["gnd"][2].update(bbx=[5, 5, 1, 9]), "not left, top, right, bottom"),
        (lambda c: c.update(imlist=["../../secret"]), "not a plain image name"),
        (lambda c: c.update(imlist=c["imlist"] * 2), "imlist names an image twice"),
        (lambda c: c.update(qimlist=[]), "qimlist must be a list of image names"),
        (lambda c: c.pop("gnd"), "must hold a dict with imlist, qimlist and gnd"),
        (lambda c: c["gnd"].__setitem__(0, 3), "is not a dict"),
    ],
)
def test_bad_ground_truth__one_sentence(data, change, message):
    change_truth(data, change)
    with pytest.raises(ValueError, match=message):
        load_retrieval_set(data.parent, "roxford5k")


def test_missing_files__named(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="data_path=.*nowhere is not a folder"):
        load_retrieval_set(tmp_path / "nowhere", "roxford5k")
    with pytest.raises(FileNotFoundError, match="there is no gnd_rparis6k.pkl"):
        load_retrieval_set(data.parent, "rparis6k")
    assert load_retrieval_set(data, "roxford5k").folder == data  # the folder itself
    (data / "jpg" / "castle_000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"database image castle_000002.jpg .*\(1 of 12"):
        load_retrieval_set(data, "roxford5k")
    (data / "jpg" / "abbey_query.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"query image abbey_query.jpg is not in"):
        load_retrieval_set(data, "roxford5k")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint": None}, ValueError, "checkpoint=None must be set to a path"),
        ({"checkpoint": "none.pth"}, FileNotFoundError, "no checkpoint file none.pth"),
        ({"imsize": 3}, ValueError, "imsize=3 must be a whole number of at least 16 or null"),
        (
            {"scales": []},
            ValueError,
            r"scales=\[\] must be a list of numbers above 0 and at most 4, one at least",
        ),
        ({"which": "ema"}, ValueError, "which='ema' must be teacher or student"),
        ({"show": ["nobody"]}, ValueError, "query image 'nobody' is not in the query list"),
        ({"show": -1}, ValueError, "show=-1 must be"),
        ({"num_workers": -1}, ValueError, "num_workers=-1 must be"),
        ({"device": "abacus"}, ValueError, "device='abacus' cannot be used here"),
    ],
)
def test_bad_settings__one_sentence_and_no_folder(
    tmp_path, data, checkpoint, changes, error, message
):
    with pytest.raises(error, match=message):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


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


def test_config__names_every_setting_with_its_default():
    path = Path(__file__).resolve().parents[3] / "configs" / "retrieval.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    del config["defaults"], config["hydra"]
    assert config == default_values(RetrievalSettings)


def test_query_boxes__missing_box(tmp_path, data, checkpoint):
    change_truth(data, lambda c: c["gnd"][1].pop("bbx"))
    with pytest.raises(ValueError, match="no bbx for query 'bridge_query'"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", query_boxes=True))


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


@pytest.mark.parametrize(("size", "scales"), [((12, 5), [1.0]), ((14, 14), [1.0, 0.5])])
def test_a_picture_smaller_than_a_patch__is_named_before_computing(
    tmp_path, data, checkpoint, size, scales, monkeypatch
):
    picture(np.random.default_rng(0), 0, size).save(data / "jpg" / "castle_000003.jpg")
    if min(size) * min(scales) + 1 < 8:
        monkeypatch.setattr(descriptors, "global_descriptor", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"castle_000003\.jpg.* smaller than one patch of 8 x 8"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", scales=scales))
