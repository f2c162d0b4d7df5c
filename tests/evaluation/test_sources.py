"""Every kind of weight file, through loading, the kNN script's runner and fine-tuning."""

import warnings

import pytest
import timm
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints.layouts import read_weights
from dinovmf_plugin.evaluation.finetuning.trainer import build_classifier
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.features.cache import load_feature_file
from dinovmf_plugin.features.network import load_network

LAYOUTS = {
    # key of the network, prefix of its tensors
    "plugin": {"teacher": "momentum_backbone.", "student": "backbone."},
    "dino": {"teacher": "backbone.", "student": "module.backbone."},
    "msn": {"teacher": "module.", "student": "module."},
}


def _vit(seed):
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0
    ).eval()


def _with(prefix, vit):
    return {f"{prefix}{name}": value for name, value in vit.state_dict().items()}


@pytest.fixture(params=list(LAYOUTS))
def stored(request, tmp_path):
    """Teacher and student, and a file of both as the project of that name writes it."""
    nets = {"teacher": _vit(1), "student": _vit(2)}
    parts = {which: _with(LAYOUTS[request.param][which], vit) for which, vit in nets.items()}
    if request.param == "plugin":
        content = {"state_dict": parts["teacher"] | parts["student"]}
        content["pytorch-lightning_version"] = "2.6.6"
        kwargs = {"normalization": "vmf"}
        cfg = {"method": "dino_vmf", "method_kwargs": kwargs, "backbone": {"kwargs": {}}}
        content["dinovmf_plugin"] = {"cfg": cfg}
    elif request.param == "dino":
        content = parts | {"epoch": 3}
    else:
        content = {"target_encoder": parts["teacher"], "encoder": parts["student"]}
        content["prototypes"] = torch.randn(4, 8)
    path = tmp_path / "file.ckpt"
    torch.save(content, path)
    return request.param, nets, path


@torch.no_grad()
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_both_networks_of_every_layout(stored, which):
    layout, nets, path = stored
    images = torch.randn(2, 3, 24, 24)
    other = "student" if which == "teacher" else "teacher"
    found = load_network(str(path), which=which)
    torch.testing.assert_close(found.model(images), nets[which](images))
    assert found.label == {"plugin": "DINO-vMF", "dino": "DINO", "msn": "MSN"}[layout]
    assert found.record["which"] == which
    assert found.identity != load_network(str(path), which=other).identity
    classifier = build_classifier(
        read_weights(path, which), 3, img_size=24, drop_path=0.0, init_scale=1.0
    ).eval()
    expected = classifier.head(nets[which](images))
    torch.testing.assert_close(classifier(images), expected)


def test_the_teacher_is_evaluated_and_the_student_on_request(
    stored, compose, run_overrides, tmp_path
):
    _, nets, path = stored
    small = ["knn.resize=24", "knn.crop_size=24", "knn.ks=[5]", f"checkpoint={path}"]

    def features(name, *overrides):
        out = tmp_path / name
        config = compose("knn", *run_overrides, *small, *overrides, f"output_dir={out}")
        which = evaluate_one(config, "knn")["checkpoint"]["which"]
        (file,) = (out / "features").glob("val-*")
        return which, load_feature_file(file)[0]

    default, student = features("default"), features("student", "which=student")
    assert (default[0], student[0]) == ("teacher", "student")
    for which, found in (default, student):
        alone = tmp_path / f"{which}.pth"
        torch.save(nets[which].state_dict(), alone)
        torch.testing.assert_close(found, features(f"{which} alone", f"checkpoint={alone}")[1])
    assert not torch.allclose(default[1], student[1])


def test_a_timm_name_with_a_local_file(tmp_path):
    """Supervised weights of timm keep their classifier in the file; it is left out."""
    torch.manual_seed(3)
    supervised = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32).eval()
    path = tmp_path / "vit_tiny.pth"
    torch.save(supervised.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is reported as unexpected
        found = load_network(str(path), model_name="vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = supervised.forward_head(supervised.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found.model(images), wanted)
    assert found.shape is not None
    assert found.shape.name == "vit_tiny/16"
    with pytest.raises(ValueError, match="'vit_small_patch16_224' has width 384, but .* width 192"):
        load_network(str(path), model_name="vit_small_patch16_224")
    with pytest.raises(ValueError, match="model_name='resnet50' is unknown"):
        load_network(str(path), model_name="resnet50")
