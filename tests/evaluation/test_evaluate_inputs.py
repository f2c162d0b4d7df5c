"""Bad folders and settings in one sentence, labels, reading by DALI, names and the script."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinovmf_plugin.data.loaders import leave_signals_to_the_parent
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.features.images import image_folder, loader_for
from dinovmf_plugin.features.network import load_network, untrained_like
from dinovmf_plugin.report.paper import method_label, paper_rows
from dinovmf_plugin.runs.files import keep_previous

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("knn", "data.train_path=null", "data.train_path=None must be set"),
        ("knn", "checkpoint=missing.pth", "no checkpoint file missing.pth"),
        ("knn", "checkpoint=random:nonsense", "names no Vision Transformer"),
        ("knn", "knn.ks=[49]", "holds only 48 images, use k <= 48"),
        (
            "knn",
            "knn.feature=tokens",
            "knn.feature='tokens' must be cls, cls_pre_norm, dino or a group",
        ),
        ("few_shot", "few_shot.split_dir=nowhere", "holds no folder imagenet_subsets1"),
        (
            "transfer",
            "transfer.folds=13",
            "class 0 has 12 images, so it would be missing in a fold",
        ),
        ("transfer", "transfer.root=nowhere", "aircraft is not at nowhere"),
        ("linear", "linear.features=[{n_last_blocks:3}]", "needs 3 blocks, but the backbone has 2"),
    ],
)
def test_bad_input_is_one_sentence_before_long_work(
    compose, run_overrides, monkeypatch, name, override, message
):
    def no_pass(*args, **kwargs):
        raise AssertionError("images were read before the check")

    monkeypatch.setattr("dinovmf_plugin.evaluation.workbench.loader_for", no_pass)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_one(compose(name, *run_overrides, override), name)


@pytest.mark.parametrize("damage", ["empty", "empty class", "new class", "unreadable", "no folder"])
def test_bad_validation_folders(make_folder, compose, run_overrides, damage):
    val = make_folder(1)
    messages = {
        "empty": "data.val_path: there are no images",
        "empty class": "data.val_path: the class folder .*blue.* has no images",
        "new class": "1 of its classes are not in the training set, such as 'zebra'",
        "unreadable": "data.val_path: 1 of 4 images cannot be read",
        "no folder": "data.val_path: .* does not exist",
    }
    if damage in ("empty", "no folder"):
        shutil.rmtree(val)
        if damage == "empty":
            val.mkdir()
    elif damage == "empty class":
        (val / "blue" / "0.png").unlink()
    elif damage == "new class":
        (val / "bar").rename(val / "zebra")
    else:
        (val / "red" / "0.png").write_bytes(b"not an image")
    overrides = [*run_overrides, f"data.val_path={val}", "data.check_images=fast"]
    with pytest.raises((ValueError, FileNotFoundError), match=messages[damage]):
        evaluate_one(compose("knn", *overrides), "knn")


def test_validation_labels_follow_the_training_classes(make_folder, folders):
    train = image_folder(str(folders[0]), "data.train_path")
    some = make_folder(2, classes=("red", "green"))
    val = image_folder(str(some), "data.val_path", classes=train.classes)
    assert val.classes == train.classes
    assert val.labels.tolist() == [2, 2, 3, 3]
    loader = loader_for(val, _transform(), batch_size=3, num_workers=0)
    assert torch.cat([labels for _, labels in loader]).tolist() == [2, 2, 3, 3]
    assert val.subset([3, 0]).labels.tolist() == [3, 2]


def _transform():
    from dinovmf_plugin.data.evaluation_loaders import CenterCrop

    return CenterCrop(24, 24)


def test_dali_reads_the_same_images(folders):
    pytest.importorskip("nvidia.dali")
    images = image_folder(str(folders[1]), "data.val_path").subset([7, 3, 12])
    pillow, dali = (
        next(iter(loader_for(images, _transform(), num_workers=1, data_format=name)))
        for name in ("image_folder", "dali")
    )
    assert pillow[1].tolist() == dali[1].tolist() == images.labels.tolist()
    torch.testing.assert_close(pillow[0], dali[0], atol=0.05, rtol=0)


def test_dali_decodes_on_the_device_of_the_network(folders, monkeypatch):
    dali = pytest.importorskip("dinovmf_plugin.data.dali.loaders", exc_type=ImportError)
    seen = []
    monkeypatch.setattr(dali, "DALIEvaluationLoader", lambda *_, **kwargs: seen.append(kwargs))
    images = image_folder(str(folders[1]), "data.val_path")
    for device in ("cuda:1", "cuda", torch.device("cpu")):
        loader_for(images, _transform(), data_format="dali", device=device)
    assert [(kwargs["device"], kwargs["device_id"]) for kwargs in seen] == [
        ("gpu", 1),
        ("gpu", None),
        ("cpu", None),
    ]


def test_workers_of_the_linear_probes_start_as_the_others(compose, run_overrides, monkeypatch):
    """Not by forking beside DALI's threads; and they leave signals to the parent."""

    class Stop(Exception):
        pass

    seen = {}

    def spy(dataset, **kwargs):
        seen.update(kwargs, dataset=pickle.loads(pickle.dumps(dataset)))  # noqa: S301
        raise Stop

    where = "dinovmf_plugin.evaluation.linear.task."
    monkeypatch.setattr(f"{where}worker_start_method", lambda n: f"started for {n}")
    monkeypatch.setattr(f"{where}DataLoader", spy)
    monkeypatch.setattr("dinovmf_plugin.evaluation.workbench.Workbench.features", lambda *_: None)
    with pytest.raises(Stop):
        evaluate_one(compose("linear", *run_overrides, "data.num_workers=3"), "linear")
    assert seen["multiprocessing_context"] == "started for 3"
    assert seen["worker_init_fn"] is leave_signals_to_the_parent
    assert seen["dataset"][0][0].shape == (3, 224, 224)


def test_previous_results_move_aside(tmp_path):
    path = tmp_path / "results.json"
    assert keep_previous(path) is None
    for i in range(3):
        path.write_text(str(i))
        keep_previous(path)
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["0", "1", "2"]
    assert not path.exists()


def test_method_names():
    vmf = {"method": "dino_multicrop", "method_kwargs": {"normalization": "vmf"}}
    assert method_label(vmf, "dinovmf_plugin") == "DINO-vMF"
    assert method_label({"method": "ibot_vmf"}, "") == "iBOT-vMF"
    assert method_label({"method": "msn", "method_kwargs": {"normalization": "l2"}}, "") == "MSN"
    assert method_label({}, "timm") == "checkpoint"


def test_the_untrained_twin_has_the_shape_but_not_the_weights(vit_file):
    trained = load_network(str(vit_file))
    twin = untrained_like(trained, seed=1)
    own, other = trained.model.state_dict(), twin.model.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}
    assert not torch.equal(own["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    again = untrained_like(trained, seed=1).model.state_dict()
    assert all(torch.equal(other[name], again[name]) for name in other)
    assert len({trained.identity, twin.identity, untrained_like(trained, 2).identity}) == 3
    with pytest.raises(ValueError, match="no untrained twin"):
        untrained_like(load_network("pixels"))


def test_the_papers_numbers_are_consistent():
    """Against averages that the paper itself prints, and rows of protocols that repeat them."""
    paper = paper_rows(None)
    for row in paper:
        if row.transfer:
            nine = [value for name, value in row.transfer.items() if name != "average"]
            assert len(nine) == 9
            # Table 5 rounds every entry to 0.1
            assert np.mean(nine) == pytest.approx(row.transfer["average"], abs=0.11)
    best = max(paper, key=lambda row: row.knn or 0)
    assert (best.method, best.architecture, best.knn) == ("iBOT-vMF", "ViT-Base/16", 78.66)
    assert {row.architecture for row in paper_rows("vit_small/16")} == {"ViT-Small/16"}
    assert paper_rows("ViT/8") == paper


def test_the_script(folders, vit_file, tmp_path):
    """The whole way once, in a process of its own."""
    train, val = folders
    command = [sys.executable, str(ROOT / "scripts" / "main_knn.py"), "data.num_workers=0"]
    command += [f"data.train_path={train}", f"data.val_path={val}", f"output_dir={tmp_path}"]
    small = ["knn.resize=24", "knn.crop_size=24", f"checkpoint={vit_file}"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "knn.json").read_text())
    assert set(result["k10"]) == {"top1", "top5"}
    assert "kNN top-1" in done.stdout
    assert "img/s" in done.stderr  # a progress bar with a rate
