"""What retrieval refuses, before anything is computed: files, ground truth, settings, pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.evaluation.retrieval import descriptors
from dinovmf_plugin.evaluation.retrieval.dataset import load_retrieval_set, read_image
from dinovmf_plugin.evaluation.retrieval.run import evaluate_retrieval
from tests.evaluation.retrieval.landmarks import change_truth, picture, settings


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


def test_query_boxes__missing_box(tmp_path, data, checkpoint):
    change_truth(data, lambda c: c["gnd"][1].pop("bbx"))
    with pytest.raises(ValueError, match="no bbx for query 'bridge_query'"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", query_boxes=True))


@pytest.mark.parametrize(("size", "scales"), [((12, 5), [1.0]), ((14, 14), [1.0, 0.5])])
def test_a_picture_smaller_than_a_patch__is_named_before_computing(
    tmp_path, data, checkpoint, size, scales, monkeypatch
):
    picture(np.random.default_rng(0), 0, size).save(data / "jpg" / "castle_000003.jpg")
    if min(size) * min(scales) + 1 < 8:
        monkeypatch.setattr(descriptors, "global_descriptor", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"castle_000003\.jpg.* smaller than one patch of 8 x 8"):
        evaluate_retrieval(settings(data, checkpoint, tmp_path / "out", scales=scales))
