"""Backbones of every published layout give the original network's features."""

import pytest
import timm
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.core.vit import forward_tokens
from tests.checkpoints.files import save

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


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


@pytest.mark.parametrize(
    "arguments",
    [
        {"pre_norm": True},
        {"qk_norm": True, "init_values": 0.1},
        {"no_embed_class": True},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"img_size": [64, 16]},
    ],
)
@torch.no_grad()
def test_arguments_that_the_config_tells_give_the_trained_features(original, tmp_path, arguments):
    sizes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    source = original.shake(VisionTransformer(**{**sizes, **arguments}, num_classes=0), 5).eval()
    config = {"backbone": {"name": "vit_tiny", "kwargs": {"patch_size": 8, **arguments}}}
    state = {f"momentum_backbone.{k}": v for k, v in source.state_dict().items()}
    content = {"state_dict": state, "dinovmf_plugin": {"cfg": config}}
    vit, report = load_backbone(save(tmp_path, content, "run.ckpt"))
    size = arguments.get("img_size", [32, 32])
    pictures = torch.randn(2, 3, *size)
    wanted = source.forward_features(pictures)[:, 0]
    torch.testing.assert_close(forward_tokens(vit, pictures)[:, 0], wanted, **TOLERANCE)
    torch.testing.assert_close(vit(pictures), wanted, **TOLERANCE)
    assert (report.missing, report.unexpected) == ((), ())


@torch.no_grad()
def test_a_rectangular_grid_with_a_square_number_of_patches(original, tmp_path):
    """8 x 2 patches are not 4 x 4: the config, then the asked size, then the square."""
    sizes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": (64, 16)}
    source = original.shake(VisionTransformer(**sizes, num_classes=0), 6).eval()
    path = save(tmp_path, source.state_dict())
    vit, report = load_backbone(path, img_size=(64, 16))
    assert (vit.patch_embed.grid_size, report.resized) == ((8, 2), None)
    pictures = torch.randn(2, 3, 64, 16)
    torch.testing.assert_close(vit(pictures), source(pictures), **TOLERANCE)
    torch.testing.assert_close(forward_tokens(vit, pictures)[:, 0], source(pictures), **TOLERANCE)
    assert load_backbone(path)[0].patch_embed.grid_size == (4, 4)
    named = {
        "state_dict": source.state_dict(),
        "config": {"pretrained_cfg": {"input_size": [3, 64, 16]}},
    }
    assert load_backbone(save(tmp_path, named))[0].patch_embed.grid_size == (8, 2)


@torch.no_grad()
def test_msn_files_resample_positions_by_the_plain_ratio(original, tmp_path):
    nets, content = original.msn()
    path = save(tmp_path, content, "m.pth.tar")
    vit, _ = load_backbone(path, num_heads=2, img_size=48)
    pos = nets["teacher"][0].pos_embed
    grid = pos[0, 1:].T.reshape(1, -1, 4, 4)
    wanted = torch.nn.functional.interpolate(grid, scale_factor=6 / 4, mode="bicubic")
    torch.testing.assert_close(vit.pos_embed[:, 1:], wanted.flatten(2).transpose(1, 2), **TOLERANCE)


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
