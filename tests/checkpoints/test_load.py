"""Backbones of every published layout give the original network's features."""

import pytest
import timm
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.core.vit import forward_tokens

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def save(folder, content, name="file.pth"):
    path = folder / name
    torch.save(content, path)
    return path


@torch.no_grad()
def check(vit, original, images):
    assert not vit.training
    torch.testing.assert_close(vit(images), original(images), **TOLERANCE)
    torch.testing.assert_close(forward_tokens(vit, images)[:, 0], original(images), **TOLERANCE)


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_full_official_checkpoint(original, images, tmp_path, kind, which):
    nets, content = original.pair(kind)
    vit, report = load_backbone(save(tmp_path, content), which=which, num_heads=2)
    check(vit, nets[which][0], images)
    assert (report.source, report.which) == (kind, which)
    assert report.missing == ()
    assert report.mismatched == ()
    assert report.coverage == 1
    masked = ("masked_embed",) if (kind, which) == ("ibot", "student") else ()
    assert report.unexpected == masked


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_msn_checkpoint(original, images, tmp_path, which):
    nets, content = original.msn()
    vit, report = load_backbone(save(tmp_path, content, "m.pth.tar"), which=which, num_heads=2)
    plain = original.ViT().eval()
    plain.load_state_dict(nets[which][0].state_dict(), strict=False)
    check(vit, plain, images)
    assert (report.source, report.which, report.unexpected) == ("msn", which, ())


@pytest.mark.parametrize("wrap", ["", "module.", "backbone.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_backbone_only(original, images, tmp_path, wrap, key):
    source = original.shake(original.ViT(), 3)
    state = original.prefixed(wrap, source)
    path = save(tmp_path, {key: state} if key else state)
    vit, report = load_backbone(path, num_heads=2)
    check(vit, source, images)
    assert (report.source, report.which) == ("timm", "unnamed")
    assert "choice of teacher or student is ignored" in str(report)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_solo_learn_checkpoint(tmp_path, images, which, old):
    def timm_vit():
        return VisionTransformer(embed_dim=192, depth=1, num_heads=3, img_size=32, num_classes=0)

    nets = {"student": timm_vit().eval(), "teacher": timm_vit().eval()}
    name = "encoder." if old else "backbone."
    state = {name + k: v for k, v in nets["student"].state_dict().items()}
    state |= {"momentum_" + name + k: v for k, v in nets["teacher"].state_dict().items()}
    state |= {"classifier.weight": torch.zeros(4, 192), "dino_loss_func.center": torch.zeros(1, 9)}
    path = save(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.1.2"}, "a.ckpt")
    vit, report = load_backbone(path, which=which)
    assert (report.source, report.which) == ("solo", which)
    torch.testing.assert_close(vit(images), nets[which](images), rtol=0, atol=0)


def test_plugin_checkpoint_tells_its_heads(plugin_checkpoint, images, tmp_path):
    nets, _, content = plugin_checkpoint
    path = save(tmp_path, content, "a.ckpt")
    for which in ("teacher", "student"):
        vit, report = load_backbone(path, which=which)
        check(vit, nets[which], images)
        assert report.source == "dinovmf_plugin"
    assert not torch.allclose(nets["teacher"](images), nets["student"](images), atol=0.1)


@pytest.mark.parametrize("size", [48, (24, 40), 16])
def test_position_embeddings_resampled_as_the_original_does(original, tmp_path, size):
    source = original.shake(original.ViT(), 3)
    path = save(tmp_path, source.state_dict())
    height, width = (size, size) if isinstance(size, int) else size
    other = torch.randn(2, 3, height, width)
    vit, report = load_backbone(path, num_heads=2, img_size=size)
    check(vit, source, other)
    assert report.resized == ((4, 4), (height // 8, width // 8))
    native, report = load_backbone(path, num_heads=2, img_size=32)
    assert report.resized is None
    torch.testing.assert_close(forward_tokens(native, other)[:, 0], source(other), **TOLERANCE)


def test_half_precision_weights_become_float32(original, tmp_path):
    source = original.shake(original.ViT(), 3).bfloat16()
    vit, _ = load_backbone(save(tmp_path, source.state_dict()), num_heads=2)
    assert vit.pos_embed.dtype == torch.float32
    torch.testing.assert_close(vit.pos_embed.data, source.pos_embed.data.float(), rtol=0, atol=0)


def test_classifier_of_a_timm_file_is_reported_and_harmless(tmp_path, images):
    source = VisionTransformer(embed_dim=192, depth=1, num_heads=3, img_size=32, num_classes=7)
    vit, report = load_backbone(save(tmp_path, source.state_dict()))
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.coverage == 1
    source.reset_classifier(0)
    torch.testing.assert_close(vit(images), source.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "heads", "name"), [(192, 3, "vit_tiny/16"), (384, 6, "vit_small/16")]
)
def test_standard_sizes_have_the_published_heads(tmp_path, width, heads, name):
    source = VisionTransformer(
        embed_dim=width, depth=12, num_heads=heads, mlp_ratio=0.25, img_size=16, num_classes=0
    )
    vit, report = load_backbone(save(tmp_path, source.state_dict()), model_name=name[:-3])
    assert vit.blocks[0].attn.num_heads == heads
    assert report.model_name.startswith(name)


def test_the_number_of_heads_is_never_guessed_silently(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    with pytest.raises(
        ValueError, match=r"file\.pth.*width 32 is no multiple of 64: pass num_heads"
    ):
        load_backbone(path)
    with pytest.raises(ValueError, match="num_heads=3 does not divide the width 32"):
        load_backbone(path, num_heads=3)
    with pytest.raises(ValueError, match="model_name='vit_small' has width 384"):
        load_backbone(path, model_name="vit_small")
    with pytest.raises(ValueError, match="model_name='resnet50' is unknown"):
        load_backbone(path, model_name="resnet50")
    wide = VisionTransformer(embed_dim=128, depth=1, num_heads=2, img_size=16, num_classes=0)
    vit, report = load_backbone(save(tmp_path, wide.state_dict()))
    assert vit.blocks[0].attn.num_heads == 2
    assert "2 heads from width / 64" in report.model_name


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


def test_too_few_matching_tensors_are_refused_with_the_report(original, tmp_path):
    state = original.ViT(depth=4).state_dict()
    few = {k: v for k, v in state.items() if ".norm2." not in k}
    with pytest.raises(
        ValueError, match=r"(?s)only 85\.2%.*95% are needed\n.*missing     8: blocks\.0"
    ):
        load_backbone(save(tmp_path, few), num_heads=2)
    foreign = state | {f"blocks.{i}.attn.q_norm.weight": torch.ones(16) for i in range(4)}
    with pytest.raises(ValueError, match=r"unexpected  4: blocks\.0\.attn\.q_norm\.weight"):
        load_backbone(save(tmp_path, foreign), num_heads=2)
    narrow = state | {f"blocks.{i}.mlp.fc1.weight": torch.ones(3, 32) for i in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"mismatched  3: .*file \(3, 32\), network \(128, 32\)"):
        load_backbone(save(tmp_path, narrow), num_heads=2)


def test_one_missing_tensor_is_a_warning_that_names_it(original, tmp_path):
    state = original.ViT(depth=4).state_dict()
    del state["norm.bias"]
    with pytest.warns(UserWarning, match=r"missing     1: norm\.bias"):
        _, report = load_backbone(save(tmp_path, state), num_heads=2)
    assert report.missing == ("norm.bias",)


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


def test_rectangular_grid_from_the_config(original, plugin_checkpoint, tmp_path):
    _, _, content = plugin_checkpoint
    state = dict(content["state_dict"])
    state["momentum_backbone.pos_embed"] = torch.randn(1, 1 + 3 * 5, 32)
    cfg = content["dinovmf_plugin"]["cfg"]
    cfg = cfg | {"backbone": {"kwargs": {"num_heads": 2, "img_size": [24, 40]}}}
    path = save(tmp_path, {"state_dict": state, "dinovmf_plugin": {"cfg": cfg}})
    vit, _ = load_backbone(path)
    assert vit.patch_embed.grid_size == (3, 5)
    assert vit(torch.randn(1, 3, 24, 40)).shape == (1, 32)


def test_folder_that_timm_itself_wrote_for_the_hub(images, tmp_path):
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
    timm.models.save_for_hf(source, str(tmp_path), model_args=sizes, safe_serialization=True)
    vit, report = load_backbone(tmp_path)
    torch.testing.assert_close(vit(images), source(images), rtol=0, atol=0)
    assert "2 heads from the file's config" in report.model_name
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_backbone(tmp_path)
