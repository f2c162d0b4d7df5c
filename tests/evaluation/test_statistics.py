"""Images are normalized by the statistics that the checkpoint was trained with."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer
from torchvision import transforms

from dinovmf_plugin.data.recipe import IMAGENET_MEAN
from dinovmf_plugin.evaluation.finetuning import run as finetune_run
from dinovmf_plugin.evaluation.finetuning.run import finetune
from dinovmf_plugin.evaluation.linear import task as linear_run
from dinovmf_plugin.evaluation.retrieval import run as retrieval_run
from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
from dinovmf_plugin.evaluation.runner import evaluate, evaluate_one
from dinovmf_plugin.evaluation.video import run as video_run
from dinovmf_plugin.evaluation.video.settings import VideoSettings
from dinovmf_plugin.features.cache import load_feature_file
from tests.evaluation.video.synthetic_video import write_moving_objects

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
KNN = ["knn.resize=24", "knn.crop_size=24", "knn.ks=[3]"]


class Stop(Exception):
    pass


@pytest.fixture
def checkpoint(tmp_path, vit_file):
    """A training checkpoint of the host; its config lies beside it, as solo-learn has it."""
    tensors = torch.load(vit_file, weights_only=True)
    state = {f"momentum_backbone.{name}": value for name, value in tensors.items()}
    path = tmp_path / "trained" / "last.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, path)
    (path.parent / "args.json").write_text(json.dumps({"data": {"dataset": "cifar10"}}))
    return path


def _by_hand(folder, vit_file, mean, std):
    vit = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0
    ).eval()
    vit.load_state_dict(torch.load(vit_file, weights_only=True))
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    files = sorted(folder.glob("*/*.png"))
    with torch.no_grad():
        return vit(torch.stack([transform(Image.open(path).convert("RGB")) for path in files]))


def test_features_settings_and_cache(compose, run_overrides, checkpoint, folders, vit_file):
    overrides = [*run_overrides, *KNN, f"checkpoint={checkpoint}"]
    cache = checkpoint.parent / "cache"
    overrides += [f"cache_dir={cache}", "evaluations=[knn]"]
    result = evaluate(compose("evaluate", *overrides, "baselines=[untrained,pixels]"))
    words = f"normalization by mean {MEAN} and std {STD}"
    for found in (result["knn"], result["baselines"]["untrained"]["knn"]):
        assert (found["settings"]["mean"], found["settings"]["std"]) == (MEAN, STD)
        assert words in found["transform"]
    assert result["baselines"]["pixels"]["knn"]["settings"]["mean"] == IMAGENET_MEAN
    before = set(cache.glob("val-*"))
    found = [load_feature_file(path)[0] for path in before]
    expected = _by_hand(folders[1], vit_file, MEAN, STD)
    assert sum(f.shape == expected.shape and torch.allclose(f, expected, atol=1e-4) for f in found)

    # the same weights, another config beside them: other features
    (checkpoint.parent / "args.json").unlink()
    again = evaluate(compose("evaluate", *overrides))["knn"]
    assert "ImageNet normalization" in again["transform"]
    (path,) = set(cache.glob("val-*")) - before
    imagenet = _by_hand(folders[1], vit_file, IMAGENET_MEAN, (0.229, 0.224, 0.225))
    torch.testing.assert_close(load_feature_file(path)[0], imagenet, atol=1e-4, rtol=0)


def test_linear_crops(compose, run_overrides, checkpoint, monkeypatch):
    seen = []

    def remember(dataset, **kwargs):
        seen.append(dataset)
        raise Stop

    monkeypatch.setattr(linear_run, "DataLoader", remember)
    monkeypatch.setattr(linear_run.Workbench, "features", lambda *_: None)
    with pytest.raises(Stop):
        evaluate_one(compose("linear", *run_overrides, f"checkpoint={checkpoint}"), "linear")
    normalize = seen[0].transform.transforms[-1]
    assert (normalize.mean, normalize.std) == (MEAN, STD)


def test_finetuning(compose, run_overrides, checkpoint, monkeypatch):
    sweeps = []

    def remember(sweep, lr, processes):
        sweeps.append(sweep)
        raise Stop

    monkeypatch.setattr(finetune_run, "_train", remember)
    small = ["finetune.resize=24", "finetune.crop_size=24", "finetune.batch_size=16"]
    with pytest.raises(Stop):
        finetune(compose("finetune", *run_overrides, *small, f"checkpoint={checkpoint}"))
    (sweep,) = sweeps
    assert (sweep.transform.mean, sweep.transform.std) == (MEAN, STD)
    steps = sweep.loader(finetune_run.Processes(), 0).dataset.transform.transforms
    (normalize,) = (step for step in steps if isinstance(step, transforms.Normalize))
    torch.testing.assert_close(torch.as_tensor(normalize.mean), torch.tensor(MEAN))
    torch.testing.assert_close(torch.as_tensor(normalize.std), torch.tensor(STD))
    assert sweep.binding["mean"] == MEAN  # no stopped training goes on with others


def test_retrieval(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    picture = Image.new("RGB", (24, 24), (255, 0, 51))
    for name in ("a", "q"):
        picture.save(folder / "jpg" / f"{name}.jpg", quality=100, subsampling=0)
    truth = {key: np.array([0] if key == "easy" else [], int) for key in ("easy", "hard", "junk")}
    content = {"imlist": ["a"], "qimlist": ["q"], "gnd": [truth | {"bbx": None}]}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    seen = []

    def remember(model, files, *args, **kwargs):
        seen.append(files[0][1].mean(dim=(1, 2)))
        raise Stop

    monkeypatch.setattr(retrieval_run, "extract_descriptors", remember)
    paths = {
        "checkpoint": str(checkpoint),
        "data_path": str(folder),
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(Stop):
        retrieval_run.evaluate_retrieval(RetrievalSettings(**paths, device="cpu"))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(seen[0], expected, atol=0.05, rtol=0)
    bound = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (bound["mean"], bound["std"]) == (list(MEAN), list(STD))


@pytest.mark.parametrize("own", [True, False])
def test_video_frames(checkpoint, vit_file, tmp_path, monkeypatch, own):
    """Their own for the network, or what the published numbers were made with for ImageNet's."""
    write_moving_objects(tmp_path / "DAVIS", sequences=1, frames=3, size=(64, 64), seed=1)
    seen = []

    def remember(path, size, statistics):
        seen.append(statistics)
        raise Stop

    monkeypatch.setattr(video_run.davis, "read_frame", remember)
    paths = {
        "checkpoint": str(checkpoint if own else vit_file),
        "data_path": str(tmp_path / "DAVIS"),
        "output_dir": str(tmp_path / "out"),
    }
    # the year without quotes is a number
    settings = VideoSettings(**paths, year=2017, size=64, device="cpu")
    with pytest.raises(Stop):
        video_run.evaluate_video_segmentation(settings)
    published = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
    assert seen[0] == ((MEAN, STD) if own else published)
    bound = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert bound["std"] == list(seen[0][1])
