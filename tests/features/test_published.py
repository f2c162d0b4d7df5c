"""``checkpoint=timm:NAME``: features of published networks are those of timm's own forward pass."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dinovmf_plugin.core.vit import forward_tokens, last_attention
from dinovmf_plugin.evaluation.retrieval.descriptors import global_descriptor
from dinovmf_plugin.evaluation.runner import evaluate_one
from dinovmf_plugin.features.extraction import backbone_features, resolve_feature
from dinovmf_plugin.features.network import load_network, untrained_like

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# plain ViT; DINOv3's class (rotary positions); a pooled ViT without CLS; convolutions
TOKENS = ("test_vit", "vit_small_patch16_dinov3")
POOLED = ("test_vit2", "test_resnet", "test_convnext")


def _weights(folder, name, scale=1.0):
    """timm's network with weights that matter, and the file that holds them."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = folder / f"{name}.pth"
    torch.save(model.state_dict(), path)
    model.reset_classifier(0)
    return model, path


def _images(model):
    size = model.pretrained_cfg["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_network_with_cls__tokens_and_attention_of_timm(tmp_path, name):
    model, path = _weights(tmp_path, name)
    network = load_network(f"timm:{name}", weight_file=path)
    images = _images(model)
    wanted = model.forward_features(images)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(forward_tokens(network.vit, images), wanted, **CLOSE)
    specs = [resolve_feature(f, network.model) for f in ("cls", {"avgpool": True}, "dino")]
    cls, pooled, dino = backbone_features(network.model, images, specs)
    torch.testing.assert_close(cls, wanted[:, 0], **CLOSE)
    torch.testing.assert_close(pooled[:, model.embed_dim :], wanted[:, prefix:].mean(1), **CLOSE)
    outputs = []
    hooks = [b.register_forward_hook(lambda *a: outputs.append(a[2])) for b in model.blocks]
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    hooks.append(attention.attn_drop.register_forward_hook(lambda *a: outputs.append(a[2])))
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    seen = outputs.pop(-2)  # within the last block
    blocks = [model.norm(x)[:, 0] for x in outputs[-4:]]
    torch.testing.assert_close(dino, torch.cat(blocks, 1), **CLOSE)
    torch.testing.assert_close(last_attention(network.vit, images), seen, **CLOSE)
    torch.testing.assert_close(network.model(images), wanted[:, 0], **CLOSE)
    mean = tuple(model.pretrained_cfg["mean"])
    assert (network.label, network.statistics.mean) == (name, mean)


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_other_network__pooled_output_of_timm(tmp_path, name):
    model, path = _weights(tmp_path, name)
    network = load_network(f"timm:{name}", weight_file=path)
    images = _images(model)
    wanted = model(images)
    spec = resolve_feature("dino", network.model)
    (found,) = backbone_features(network.model, images, [spec])
    torch.testing.assert_close(found, wanted, **CLOSE)
    descriptor = global_descriptor(network.model, images)
    torch.testing.assert_close(descriptor, torch.nn.functional.normalize(wanted, dim=1), **CLOSE)
    twin = untrained_like(network).model(images)
    assert twin.shape == wanted.shape
    assert not torch.allclose(twin, wanted, atol=1e-2)
    with pytest.raises(ValueError, match="has no patch tokens"):
        _ = network.vit


@torch.no_grad()
def test_plain_vit__other_sizes__positions_as_timm(tmp_path):
    _, path = _weights(tmp_path, "test_vit")
    network = load_network("timm:test_vit", weight_file=path)
    images = torch.randn(1, 3, 96, 128)
    flexible = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    flexible.load_state_dict(network.model.state_dict())
    wanted = flexible.forward_features(images)
    torch.testing.assert_close(forward_tokens(network.vit, images), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_knn__one_row_of_a_table(tmp_path, name):
    _, path = _weights(tmp_path, name)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, color in (("a", 40), ("b", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.clip(rng.normal(color, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = {
        "checkpoint": f"timm:{name}",
        "weight_file": str(path),
        "output_dir": str(tmp_path / "out"),
        "data": {
            "train_path": str(tmp_path / "train"),
            "val_path": str(tmp_path / "val"),
            "num_workers": 0,
        },
        "baselines": ["untrained"],
        "device": "cpu",
        "progress": False,
        "knn": {"ks": [3], "resize": 160, "crop_size": 160},
    }
    result = evaluate_one(config, "knn")
    assert result["checkpoint"]["weight_file"] == str(path)
    assert result["k3"]["top1"] == 100
    assert list(result["baselines"]) == ["untrained"]


def test_what_cannot_be_loaded__one_sentence(tmp_path):
    _, path = _weights(tmp_path, "test_vit")
    cases = [
        ({"checkpoint": "timm:test_vit"}, "timm:test_vit needs weight_file=FILE"),
        ({"checkpoint": "timm:resnet5O", "weight_file": path}, "did you mean timm:resnet50"),
        ({"checkpoint": "pixels", "weight_file": path}, "is that of checkpoint=timm:NAME, not of"),
        ({"checkpoint": "timm:test_vit", "weight_file": path, "head": True}, "has no prototypes"),
        ({"checkpoint": "timm:test_resnet", "weight_file": path}, "it lacks conv1"),
        ({"checkpoint": "timm:test_vit", "weight_file": tmp_path / "no.pth"}, "no.pth"),
    ]
    for arguments, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_network(**arguments)
        assert "\n" not in str(error.value)
    fixed = load_network("timm:test_convnext", weight_file=_weights(tmp_path, "test_convnext")[1])
    assert fixed.image_size == 160
