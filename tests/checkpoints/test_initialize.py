"""Going on from imported weights, and the files of real training runs."""

import re

import pytest
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints import initialize_from, load_backbone, load_head
from dinovmf_plugin.checkpoints.transfer import import_weights
from dinovmf_plugin.core.heads import DINOHead

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def save(folder, content, name="file.pth"):
    path = folder / name
    torch.save(content, path)
    return path


def small_vit(**kwargs):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    return VisionTransformer(**sizes | kwargs, num_classes=0)


def small_head(k=24):
    return DINOHead(32, hidden_dim=40, bottleneck_dim=16, num_prototypes=k, normalization="vmf")


@pytest.mark.parametrize("which", ["teacher", "student"])
@torch.no_grad()
def test_initialize_from_official_weights(original, images, tmp_path, which):
    nets, content = original.pair("dino")
    path = save(tmp_path, content)
    vit, head = small_vit(drop_path_rate=0.1), small_head()
    report = initialize_from(vit, head, path, which)
    torch.testing.assert_close(vit.eval()(images), nets[which][0](images), **TOLERANCE)
    features = torch.randn(4, 32)
    scores = head.last_layer.scores(head(features))
    torch.testing.assert_close(scores, nets[which][1](features), **TOLERANCE)
    assert len(report.head_matched) == 8
    assert report.head_skipped == ()
    assert "head        8 tensors matched" in str(report)


@torch.no_grad()
def test_initialize_from_keeps_new_prototypes_and_resamples(original, tmp_path):
    nets, content = original.pair("dino")
    path = save(tmp_path, content)
    vit, head = small_vit(img_size=48), small_head(k=30)
    before = head.last_layer.weight_v.clone()
    report = initialize_from(vit, head, path)
    larger = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(vit.eval()(larger), nets["teacher"][0](larger), **TOLERANCE)
    assert report.resized == ((4, 4), (6, 6))
    torch.testing.assert_close(head.mlp[0].weight, nets["teacher"][1].mlp[0].weight)
    torch.testing.assert_close(head.last_layer.weight_v, before, rtol=0, atol=0)
    assert len(report.head_matched) == 6
    assert "last_layer.weight_v (file (24, 16), network (30, 16))" in report.head_skipped


def test_initialize_from_backbone_only_file_names_the_missing_head(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    report = initialize_from(small_vit(), small_head(), path)
    assert report.head_matched == ()
    assert "mlp.0.weight (not in the file)" in report.head_skipped
    assert initialize_from(small_vit(), None, path).head_skipped == ()


def test_initialize_from_refuses_other_networks(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    vit = small_vit(embed_dim=64)
    before = vit.pos_embed.detach().clone()
    with pytest.raises(ValueError, match=r"was refused: it has another shape of "):
        initialize_from(vit, None, path)
    torch.testing.assert_close(vit.pos_embed.data, before, rtol=0, atol=0)
    wide = VisionTransformer(embed_dim=192, depth=1, num_heads=3, num_classes=0)
    twelve = VisionTransformer(embed_dim=192, depth=1, num_heads=12, num_classes=0)
    with pytest.raises(ValueError, match="has 3 attention heads .*, but the backbone has 12"):
        initialize_from(twelve, None, save(tmp_path, wide.state_dict()))
    with pytest.raises(ValueError, match="cannot fill a Linear"):
        initialize_from(torch.nn.Linear(2, 2), None, path)


def test_initialize_from_refuses_what_does_not_fit_by_name(original, tmp_path):
    state = original.shake(original.ViT(depth=4), 1).state_dict()
    vit = small_vit(depth=4)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"it lacks blocks\.1\.mlp\.fc1\.bias; .* 98\.1%"):
        initialize_from(vit, None, save(tmp_path, state))
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"another shape of blocks\.1\.mlp\.fc1\.bias \(file \(3,\)"
    ):
        initialize_from(vit, None, save(tmp_path, state))
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"patch_size": 16}, "patch_embed.proj.weight"),
        ({"in_chans": 1}, "patch_embed.proj.weight"),
        ({"patch_size": (8, 16)}, "patch_embed.proj.weight"),
        ({"depth": 11}, "blocks.11.norm1.weight"),
        ({"mlp_ratio": 3.0}, "blocks.0.mlp.fc1.weight"),
        ({"init_values": 0.1}, "blocks.0.ls1.gamma"),
        ({"reg_tokens": 2}, "reg_token"),
        ({"pre_norm": True}, "norm_pre.weight"),
        ({"global_pool": "avg"}, "fc_norm.weight"),
    ],
)
def test_initialize_from_another_network_is_refused_by_name(tmp_path, arguments, named):
    sizes = {"depth": 12, "embed_dim": 192, "num_heads": 3}
    path = save(tmp_path, small_vit(**sizes | arguments).state_dict())
    with pytest.raises(ValueError, match=re.escape(named)):
        initialize_from(small_vit(**sizes), None, path)


@torch.no_grad()
def test_initialize_from_asks_the_network_for_what_no_tensor_tells(original, tmp_path):
    arguments = {"pre_norm": True, "qk_norm": True, "no_embed_class": True, "img_size": (64, 16)}
    source = original.shake(small_vit(**arguments), 4)
    target = small_vit(**arguments)
    initialize_from(target, None, save(tmp_path, source.state_dict()))
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)


def test_init_from_ibots_student_takes_the_mask_token_for_ibot_alone(
    original, tiny_cfg, build, tmp_path
):
    vit = VisionTransformer(embed_dim=192, num_heads=3, img_size=32, patch_size=16, num_classes=0)
    student = original.prefixed("backbone.", vit)
    student["backbone.masked_embed"] = torch.randn(1, 192)
    path = save(tmp_path, {"student": student, "teacher": original.prefixed("backbone.", vit)})
    overrides = {"backbone.name": "vit_tiny", "method_kwargs.init_from": str(path)}
    build(tiny_cfg("dino_multicrop", **overrides, **{"method_kwargs.init_which": "student"}))
    report = initialize_from(vit, None, path, "student")
    assert "mask token  left out: this network masks nothing" in str(report)
    for which, expected in (("student", student["backbone.masked_embed"]), ("teacher", 0)):
        cfg = tiny_cfg("ibot", **overrides, **{"method_kwargs.init_which": which})
        token = build(cfg).mask_token.detach()
        torch.testing.assert_close(token, torch.zeros(1, 1, 192) + expected, rtol=0, atol=0)


# --- real training runs ----------------------------------------------------------------------


@torch.no_grad()
def equal_features(vit, module, which, size=32):
    images = torch.randn(2, 3, size, size)
    prefix = "momentum_" if which == "teacher" else ""
    name = "backbone" if hasattr(module, "backbone") else "encoder"  # solo-learn up to 1.0.2
    source = getattr(module, prefix + name)
    torch.testing.assert_close(vit(images), source.eval()(images), **TOLERANCE)


def test_a_real_training_checkpoint(tiny_cfg, crop_loader, build, fit, tmp_path):
    module = build(tiny_cfg("dino_vmf", **{"momentum.base_tau": 0.5}))
    trainer = fit(module, crop_loader(steps=2), max_epochs=1)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    for which in ("teacher", "student"):
        vit, report = load_backbone(path, which=which)
        assert (report.source, report.unexpected, report.coverage) == ("dinovmf_plugin", (), 1)
        equal_features(vit, module, which)
    head, settings = load_head(path)
    y = torch.randn(3, module.features_dim)
    wanted = module.momentum_head.last_layer(module.momentum_head(y), 0.1)
    torch.testing.assert_close(head.last_layer(head(y), 0.1), wanted, **TOLERANCE)
    assert (settings.method, settings.normalization, settings.centering) == (
        "dino_vmf",
        "vmf",
        "probability",
    )
    assert settings.assumed == ()


def test_init_from_starts_student_and_teacher_from_the_file(original, tiny_cfg, build, tmp_path):
    vit = VisionTransformer(embed_dim=192, num_heads=3, img_size=32, patch_size=16, num_classes=0)
    head = DINOHead(192, hidden_dim=24, bottleneck_dim=8, num_prototypes=32)
    content = {"teacher": original.prefixed("backbone.", vit) | original.prefixed("head.", head)}
    imported = tmp_path / "imported" / "weights.safetensors"
    import_weights(save(tmp_path, content), imported, source="dino")
    overrides = {"method_kwargs.init_from": str(imported), "method_kwargs.num_prototypes": 48}
    overrides["backbone.name"] = "vit_tiny"
    module = build(tiny_cfg("dino_vmf", **overrides), seed=1)
    for part in (module.backbone, module.momentum_backbone):
        for name, value in part.state_dict().items():
            torch.testing.assert_close(value, vit.state_dict()[name], rtol=0, atol=0)
    for part in (module.head, module.momentum_head):
        torch.testing.assert_close(part.mlp[0].weight, head.mlp[0].weight, rtol=0, atol=0)
        assert part.last_layer.weight_v.shape[0] == 48


def test_solo_learns_own_dino_run(tiny_cfg, build, fit, tmp_path):
    """The host's DINO, with BatchNorm in its head, as its own training leaves it on disk."""
    kwargs = {
        "proj_hidden_dim": 24,
        "proj_output_dim": 8,
        "num_prototypes": 32,
        "use_bn_in_head": True,
        "norm_last_layer": False,
        "clip_grad": 0.0,
        "freeze_last_layer": 0,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "warmup_teacher_temperature": 0.04,
        "warmup_teacher_temperature_epochs": 1,
    }
    cfg = tiny_cfg("dino")
    cfg.method_kwargs = kwargs
    module = build(cfg)
    with torch.no_grad():
        module.momentum_head.last_layer.weight_g.uniform_(0.5, 2)
    path = save(tmp_path, {"state_dict": module.state_dict()}, "host.ckpt")
    vit, report = load_backbone(path)
    assert (report.source, report.missing, report.unexpected) == ("solo", (), ())
    equal_features(vit, module, "teacher")
    head, settings = load_head(path)
    features = torch.randn(3, module.features_dim)
    with torch.no_grad():
        wanted = module.momentum_head.eval()(features)
        torch.testing.assert_close(head.last_layer(head(features)), wanted, **TOLERANCE)
    assert settings.normalization == "none"


def test_init_from_a_file_that_is_not_there__the_key_is_named(tiny_cfg, build):
    with pytest.raises(FileNotFoundError, match=r"method_kwargs\.init_from=no\.ckpt: "):
        build(tiny_cfg(**{"method_kwargs.init_from": "no.ckpt"}))
