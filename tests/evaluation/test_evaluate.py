"""Evaluations from a checkpoint and two folders to results.json and a page, against maths by hand."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer
from torchvision import transforms

from dinovmf_plugin.evaluation.logistic.few_shot import few_shot_accuracy
from dinovmf_plugin.evaluation.logistic.transfer import cross_validated_accuracy
from dinovmf_plugin.evaluation.runner import evaluate, evaluate_one
from dinovmf_plugin.features.extraction import backbone_features
from dinovmf_plugin.features.knn import knn_accuracy

SMALL = [
    f"{name}.{key}=24" for name in ("knn", "linear", "few_shot") for key in ("resize", "crop_size")
]
SMALL += [
    "transfer.resize=24",
    "transfer.crop_size=24",
    "linear.epochs=2",
    "linear.lrs=[0.001,0.1]",
]
SMALL += ["transfer.num_values=5"]


def _by_hand(folder, vit_file, pre_norm=False, interpolation="bicubic"):
    """Features of a folder with torchvision and timm alone."""
    vit = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0
    )
    vit.load_state_dict(torch.load(vit_file, weights_only=True))
    if pre_norm:
        vit.norm = torch.nn.Identity()
    transform = transforms.Compose(
        [
            transforms.Resize(24, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = sorted(folder.glob("*/*.png"))
    classes = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        features = vit.eval()(images)
    return features, torch.tensor([classes.index(path.parent.name) for path in paths])


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are skipped")
        yield


def test_all_four_in_one_report(compose, run_overrides, folders, vit_file, tmp_path, quiet):
    config = compose("evaluate", *run_overrides, *SMALL, "baselines=[untrained,pixels]")
    results = evaluate(config)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))

    train, val = (_by_hand(folder, vit_file) for folder in folders)
    expected = knn_accuracy(*train, *val, ks=[10, 20], temperature=0.07)
    knn = written["knn"]
    assert knn["k10"] == pytest.approx(dict(zip(("top1", "top5"), expected[10], strict=True)))
    assert knn["k20"]["top1"] == pytest.approx(expected[20][0])
    assert knn["skipped_ks"] == [100, 200]
    assert "k100" not in knn

    transfer = cross_validated_accuracy(*train, *val, weight_decays=np.logspace(-6, 5, 5).tolist())
    found = written["transfer"]["datasets"]["data"]
    assert found["top1"] == pytest.approx(transfer["top1"])
    assert found["cv"]["top1"] == pytest.approx(transfer["cv"]["top1"])
    assert written["transfer"]["average"]["top1"] == found["top1"]

    few = written["few_shot"]
    assert set(few["top1"]) == {"1 per class", "2 per class", "5 per class", "1 %"}
    assert len(few["top1"]["5 per class"]["accuracy"]) == 3
    assert few["splits"] == "drawn, seed 0"

    linear = written["linear"]["features"]
    assert [linear[name]["dim"] for name in ("cls", "dino")] == [192, 384]
    assert len(linear["cls"]["curves"]["top1"][0]) == 2

    baselines = written["baselines"]
    assert set(baselines) == {"untrained", "pixels"}
    assert all(
        set(found) == {"knn", "linear", "few_shot", "transfer"} for found in baselines.values()
    )
    assert set(baselines["pixels"]["linear"]["features"]) == {"output"}
    # another network: not the same features from the cache
    assert baselines["untrained"]["linear"]["features"]["cls"] != linear["cls"]

    assert re.fullmatch("[0-9a-f]{64}", written["checkpoint"]["sha256"])
    assert (
        written["settings"]["few_shot"]["lambd"]
        == written["few_shot"]["settings"]["lambd"]
        == 0.075
    )
    assert {"torch", "timm", "scikit-learn", "dinovmf_plugin"} <= set(written["versions"])
    assert written["seconds"] > 0

    page = (tmp_path / "out" / "results.html").read_text()
    # 80.20 and 80.27: [C] and [D] of iBOT-vMF
    for text in (
        "78.66",
        "<td>80.20</td><td>80.27</td>",
        "68.30\u00a0±\u00a00.30</td><td>72.30",
        "untrained",
    ):
        assert text in page
    assert "iBOT-vMF ViT-Base/16, paper (ImageNet)" in page
    assert "Table 5)" not in page  # none of the paper's data sets is here
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained


def test_a_second_run_uses_the_features_and_keeps_the_first_result(
    compose, run_overrides, tmp_path, monkeypatch
):
    overrides = [*run_overrides, "knn.resize=24", "knn.crop_size=24", "knn.ks=[5]"]
    first = evaluate_one(compose("knn", *overrides), "knn")

    def no_pass(*args, **kwargs):
        raise AssertionError("the network was run again")

    monkeypatch.setattr("dinovmf_plugin.evaluation.workbench.extract_feature_set", no_pass)
    second = evaluate_one(compose("knn", *overrides), "knn")
    assert second["k5"] == first["k5"]
    out = tmp_path / "out"
    assert json.loads((out / "knn.1.json").read_text())["started"] == first["started"]
    written = json.loads((out / "knn.json").read_text())
    assert written["k5"] == first["k5"]
    assert written["run_settings"]["knn"]["ks"] == [5]
    with pytest.raises(AssertionError, match="run again"):  # another transform, other features
        evaluate_one(compose("knn", *overrides, "knn.interpolation=bilinear"), "knn")


def test_half_precision_cache_repeats_itself(compose, run_overrides, tmp_path):
    overrides = [*run_overrides, "knn.resize=24", "knn.crop_size=24", "knn.ks=[5]"]
    overrides += ["cache_dtype=float16", f"cache_dir={tmp_path / 'cache'}"]
    first = evaluate_one(compose("knn", *overrides), "knn")
    assert evaluate_one(compose("knn", *overrides), "knn")["k5"] == first["k5"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_feature_file_of_another_backbone_is_refused(compose, run_overrides, tmp_path):
    overrides = [*run_overrides, "knn.resize=24", "knn.crop_size=24", "knn.ks=[5]"]
    evaluate_one(compose("knn", *overrides), "knn")
    other = [*overrides, "checkpoint=pixels"]
    evaluate_one(compose("knn", *other, f"output_dir={tmp_path / 'pixels'}"), "knn")
    ours = sorted((tmp_path / "out" / "features").iterdir())
    theirs = sorted((tmp_path / "pixels" / "features").iterdir())
    shutil.copy(
        next(f for f in theirs if "train" in f.name), next(f for f in ours if "train" in f.name)
    )
    with pytest.raises(
        ValueError, match="made with something else .*backbone: the file has 'pixels"
    ):
        evaluate_one(compose("knn", *overrides), "knn")


def test_linear_without_augmentation_and_with_held_out_images(
    compose, run_overrides, tmp_path, monkeypatch
):
    small = [
        "linear.resize=24",
        "linear.crop_size=24",
        "linear.lrs=[0.001,0.03]",
        "linear.epochs=6",
    ]
    config = compose(
        "linear", *run_overrides, *small, "linear.augment=false", "linear.holdout=0.25"
    )
    result = evaluate_one(config, "linear")
    assert result["train_images"] == 36
    chosen = result["features"]["cls"]["chosen"]
    assert chosen["selected_on"] == "held-out training images"
    best = result["features"]["cls"]["best"]["top1"]
    assert chosen["top1"] <= best
    assert best > 25  # four classes
    names = {path.name.split("-")[0] for path in (tmp_path / "out" / "features").iterdir()}
    assert names == {"train", "val", "held"}

    def no_pass(*args, **kwargs):
        raise AssertionError("the network was run again")

    monkeypatch.setattr("dinovmf_plugin.evaluation.workbench.extract_feature_set", no_pass)
    again = evaluate_one(config, "linear")
    assert again["features"] == result["features"]


def test_linear_with_augmentation_passes_every_image_once_per_epoch(
    compose, run_overrides, monkeypatch
):
    """[C] and [D] at every learning rate from one pass of the backbone; other crops every epoch."""
    seen = []

    def spy(model, images, specs):
        seen.append((images.clone(), [str(spec) for spec in specs]))
        return backbone_features(model, images, specs)

    monkeypatch.setattr("dinovmf_plugin.evaluation.linear.task.backbone_features", spy)
    small = ["linear.resize=24", "linear.crop_size=24", "linear.epochs=2", "linear.batch_size=32"]
    config = compose("linear", *run_overrides, *small, "linear.lrs=[0.001,0.01,0.1]")
    result = evaluate_one(config, "linear")
    assert [len(images) for images, _ in seen] == [32, 16, 32, 16]
    assert all(len(specs) == 2 for _, specs in seen)
    first, second = torch.cat([seen[0][0], seen[1][0]]), torch.cat([seen[2][0], seen[3][0]])
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    for name in ("cls", "dino"):
        assert len(result["features"][name]["last"]) == 3
        assert result["features"][name]["protocol_lr"]["last"]["lr"] == 0.001


def test_few_shot_from_published_lists(compose, run_overrides, folders, vit_file, tmp_path, quiet):
    lists = tmp_path / "lists" / "imagenet_subsets1"
    lists.mkdir(parents=True)
    # file names must be unique, as ImageNet's: a folder with the class in front
    renamed = tmp_path / "train"
    for path in folders[0].glob("*/*.png"):
        target = renamed / path.parent.name / f"{path.parent.name}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    chosen = [f"{name}_{i}.png" for name in ("bar", "blue", "green", "red") for i in (3, 11)]
    (lists / "2imgs_class.txt").write_text("\n".join(reversed(chosen)))
    small = ["few_shot.resize=24", "few_shot.crop_size=24", "few_shot.counts=[2]"]
    small += ["few_shot.num_splits=1", "few_shot.fraction=null"]
    small += [f"few_shot.split_dir={lists.parent}", f"data.train_path={renamed}"]
    result = evaluate_one(compose("few_shot", *run_overrides, *small), "few_shot")
    features, labels = _by_hand(renamed, vit_file, pre_norm=True, interpolation="bilinear")
    names = [path.name for path in sorted(renamed.glob("*/*.png"))]
    rows = [i for i, name in enumerate(names) if name in chosen]
    val = _by_hand(folders[1], vit_file, pre_norm=True, interpolation="bilinear")
    expected = few_shot_accuracy(features[rows], labels[rows], *val)
    assert result["top1"] == {
        "2 per class": {"mean": expected, "std": 0.0, "accuracy": [expected], "images": [8]}
    }
    # only the listed images went through the network
    sizes = {p.name.split("-")[0] for p in (tmp_path / "out" / "features").iterdir()}
    assert sizes == {"few", "val"}
