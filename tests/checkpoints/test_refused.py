"""Weight files that hold another network than a plain ViT, or not all of one, are refused by name."""

import re

import pytest
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints import load_backbone
from tests.checkpoints.files import save


def test_a_missing_block_is_refused(original, tmp_path):
    state = {k.replace("blocks.1.", "blocks.9."): v for k, v in original.ViT().state_dict().items()}
    with pytest.raises(ValueError, match="has 2 blocks, which are not numbered 0 to 1"):
        load_backbone(save(tmp_path, state), num_heads=2)


def test_other_networks_are_refused(tmp_path):
    state = {f"{p}backbone.conv1.weight": torch.zeros(8, 3, 7, 7) for p in ("", "momentum_")}
    path = save(tmp_path, {"state_dict": state})
    with pytest.raises(ValueError, match="only plain Vision Transformers are supported.*conv1"):
        load_backbone(path)
    with pytest.raises(ValueError, match="its first tensors are none"):
        load_backbone(save(tmp_path, {"epoch": 3}))


def test_tensors_that_do_not_fit_are_refused_by_name(original, tmp_path):
    state = original.ViT(depth=4).state_dict()
    few = {k: v for k, v in state.items() if ".norm2." not in k}
    with pytest.raises(ValueError, match=r"it lacks blocks\.0\.norm2\.weight.*85\.2%"):
        load_backbone(save(tmp_path, few), num_heads=2)
    foreign = state | {f"blocks.{i}.attn.q_norm.weight": torch.ones(16) for i in range(4)}
    with pytest.raises(ValueError, match=r"no place for its blocks\.0\.attn\.q_norm\.weight"):
        load_backbone(save(tmp_path, foreign), num_heads=2)
    narrow = state | {f"blocks.{i}.mlp.fc1.weight": torch.ones(3, 32) for i in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"another shape of .*file \(3, 32\), network \(128, 32\)"):
        load_backbone(save(tmp_path, narrow), num_heads=2)


@pytest.mark.parametrize("name", ["norm.bias", "cls_token", "pos_embed", "blocks.1.mlp.fc2.bias"])
def test_one_missing_tensor_is_refused_by_name(original, tmp_path, name):
    state = original.ViT(depth=4).state_dict()
    del state[name]
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load_backbone(save(tmp_path, state), num_heads=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pre_norm": True}, "norm_pre.weight"),  # as CLIP has it
        ({"global_pool": "avg"}, "fc_norm.weight"),
        ({"final_norm": False}, "norm.weight"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight"),
        ({"scale_attn_norm": True}, "blocks.0.attn.norm.weight"),
        ({"proj_bias": False}, "blocks.0.attn.proj.bias"),
    ],
)
def test_parts_that_no_plain_vit_has_are_refused_by_name(tmp_path, arguments, named):
    """Under any tolerance: 2 tensors of 150 turned the features to a cosine of 0.28."""
    sizes = {"embed_dim": 192, "num_heads": 3, "patch_size": 8, "img_size": 32, "num_classes": 0}
    source = VisionTransformer(**sizes, **arguments)
    with pytest.raises(ValueError, match=re.escape(named)):
        load_backbone(save(tmp_path, source.state_dict()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"act_layer": "quick_gelu"},
            r"kwargs\.act_layer='quick_gelu' is not supported: no stored weight",
        ),
        ({"global_pool": "avg"}, r"kwargs\.global_pool='avg' is not supported: .* needs 'token'"),
    ],
)
def test_arguments_that_no_tensor_tells_are_refused(original, tmp_path, arguments, message):
    state = {f"momentum_backbone.{k}": v for k, v in original.ViT().state_dict().items()}
    config = {"backbone": {"name": "vit_tiny", "kwargs": arguments}}
    path = save(tmp_path, {"state_dict": state, "dinovmf_plugin": {"cfg": config}}, "run.ckpt")
    with pytest.raises(ValueError, match=message):
        load_backbone(path, num_heads=2)


def test_names_of_another_framework_are_not_told_to_try_the_student(original, tmp_path):
    """Lightly's checkpoints: student_backbone.*, teacher_backbone.*"""
    vit = original.ViT().state_dict()
    state = {f"{net}_backbone.{k}": v for net in ("student", "teacher") for k, v in vit.items()}
    path = save(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.0"}, "a.ckpt")
    for which in ("teacher", "student"):
        with pytest.raises(
            ValueError, match="its parts are student_backbone, teacher_backbone"
        ) as e:
            load_backbone(path, which=which)
        assert "try which" not in str(e.value)
    resnet = {"backbone.0.weight": torch.zeros(8, 3, 7, 7)}
    path = save(tmp_path, {"state_dict": resnet, "pytorch-lightning_version": "2.0"}, "a.ckpt")
    with pytest.raises(ValueError, match="holds no teacher backbone under solo-learn's names"):
        load_backbone(path)
    student = {f"backbone.{k}": v for k, v in vit.items()}
    path = save(tmp_path, {"state_dict": student, "pytorch-lightning_version": "2.0"}, "a.ckpt")
    with pytest.raises(ValueError, match="holds no teacher backbone: try which='student'"):
        load_backbone(path)


def test_diverged_weights_are_refused(original, tmp_path):
    state = original.ViT().state_dict()
    state["blocks.1.attn.proj.bias"][3] = torch.nan
    with pytest.raises(ValueError, match=r"inf or nan in blocks\.1\.attn\.proj\.bias"):
        load_backbone(save(tmp_path, state), num_heads=2)


def test_absent_networks_are_named(original, tmp_path):
    _, content = original.pair("dino")
    del content["teacher"]
    with pytest.raises(ValueError, match="holds no teacher weights; its keys are args"):
        load_backbone(save(tmp_path, content))
    _, content = original.msn()
    content["target_encoder"] = None
    with pytest.raises(ValueError, match="holds no target_encoder, MSN's name for the teacher"):
        load_backbone(save(tmp_path, content))
    alone = {
        "state_dict": original.prefixed("backbone.", original.ViT())
        | {"classifier.bias": torch.ones(2)}
    }
    with pytest.raises(ValueError, match="no teacher backbone: try which='student'"):
        load_backbone(save(tmp_path, alone))
    with pytest.raises(ValueError, match="which='ema' is unknown"):
        load_backbone(save(tmp_path, alone), which="ema")


def test_bad_sizes_are_refused(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    with pytest.raises(ValueError, match="img_size=33 is no multiple of the patch size 8x8"):
        load_backbone(path, num_heads=2, img_size=33)
    state = original.ViT().state_dict()
    state["pos_embed"] = torch.zeros(1, 1 + 15, 32)
    with pytest.raises(ValueError, match="15 patch position embeddings make no square grid"):
        load_backbone(save(tmp_path, state), num_heads=2)
