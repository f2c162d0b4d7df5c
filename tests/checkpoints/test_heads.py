"""Projection heads of every published layout give the original logits."""

import json

import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.checkpoints import load_head
from dinovmf_plugin.core.vmf import exact_log_normalizer

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def features():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def save(folder, content, name="file.pth"):
    path = folder / name
    torch.save(content, path)
    return path


def dino_file(folder, head, **args):
    import argparse

    content = {"teacher": {f"head.{k}": v for k, v in head.state_dict().items()}}
    return save(folder, content | ({"args": argparse.Namespace(**args)} if args else {}))


@torch.no_grad()
def logits(head, features, temperature=1.0):
    return head.last_layer(head(features), temperature)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_dino_head(original, features, tmp_path, which):
    nets, content = original.pair("dino")
    head, settings = load_head(save(tmp_path, content), which=which)
    torch.testing.assert_close(logits(head, features), nets[which][1](features), **TOLERANCE)
    assert (settings.normalization, settings.centering, settings.method) == (
        "none",
        "logit",
        "dino",
    )
    assert (settings.student_temperature, settings.teacher_temperature) == (0.1, 0.05)
    assert set(settings.assumed) == {"method", "student_temperature", "centering"}
    assert settings.patch_prototypes is None
    assert not head.training


@pytest.mark.parametrize(
    "options", [{"bn": True}, {"layers": 1}, {"layers": 2}, {"parametrized": True}]
)
def test_variants_of_the_dino_head(original, features, tmp_path, options):
    source = original.shake(original.Head(**options), 7)
    head, _ = load_head(dino_file(tmp_path, source))
    torch.testing.assert_close(logits(head, features), source(features), **TOLERANCE)


@pytest.mark.parametrize(
    ("unit", "args", "expected"),
    [
        (True, {}, "l2"),
        (False, {}, "none"),
        (True, {"norm_last_layer": False}, "none"),
        (True, {"norm_last_layer": True}, "l2"),
    ],
)
def test_normalization_is_told_or_read_off_the_magnitudes(original, tmp_path, unit, args, expected):
    source = original.shake(original.Head(), 7, unit_magnitudes=unit)
    _, settings = load_head(dino_file(tmp_path, source, **args))
    assert settings.normalization == expected
    assert ("normalization" in settings.assumed) == (not args)
    assert settings.teacher_temperature == 0.07
    assert "teacher_temperature" in settings.assumed


def test_stale_product_of_weight_norm_is_ignored(original, features, tmp_path):
    source = original.shake(original.Head(), 7)
    state = {f"head.{k}": v for k, v in source.state_dict().items()}
    state["head.last_layer.weight"] = torch.full((24, 16), 99.0)
    head, _ = load_head(save(tmp_path, {"teacher": state}))
    torch.testing.assert_close(logits(head, features), source(features), **TOLERANCE)


def test_ibot_separate_and_shared_patch_prototypes(original, features, tmp_path):
    nets, content = original.pair("ibot")
    path = save(tmp_path, content)
    cls, settings = load_head(path)
    patch, _ = load_head(path, tokens="patch")
    source = nets["teacher"][1]
    assert (settings.method, settings.normalization) == ("ibot", "l2")
    assert settings.patch_prototypes == "separate"
    torch.testing.assert_close(logits(cls, features), source(features), **TOLERANCE)
    torch.testing.assert_close(
        logits(patch, features), source(features, "last_layer2"), **TOLERANCE
    )

    shared = original.shake(original.Head(shared=True), 3)
    path = dino_file(tmp_path, shared)
    cls, settings = load_head(path)
    patch, _ = load_head(path, tokens="patch")
    assert settings.patch_prototypes == "shared"
    assert settings.method == "ibot"
    torch.testing.assert_close(logits(patch, features), shared(features), **TOLERANCE)
    with pytest.raises(ValueError, match="tokens='all' is unknown"):
        load_head(path, tokens="all")


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_msn_head_and_prototypes(original, features, tmp_path, which, bn):
    nets, content = original.msn(bn)
    head, settings = load_head(save(tmp_path, content), which=which)
    z = F.normalize(nets[which][1](features), dim=-1)
    cosine = z @ F.normalize(content["prototypes"], dim=-1).T
    torch.testing.assert_close(logits(head, features, 0.1), cosine / 0.1, **TOLERANCE)
    assert (settings.method, settings.normalization, settings.centering) == (
        "msn",
        "l2",
        "sinkhorn",
    )
    assert settings.student_temperature == 0.1
    assert settings.teacher_temperature == pytest.approx(0.025)  # softmax(c/0.1) sharpened by 1/4


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_plugin_vmf_head(plugin_checkpoint, features, tmp_path, which):
    _, heads, content = plugin_checkpoint
    head, settings = load_head(save(tmp_path, content, "a.ckpt"), which=which)
    assert (settings.normalization, settings.centering) == ("vmf", "probability")
    assert (settings.method, settings.normalizer_order, settings.assumed) == ("dino_vmf", 1, ())
    assert head.last_layer.order == 1
    kappa = heads[which].last_layer.weight_g.detach().squeeze(-1).abs().double() / 0.1
    bias = torch.as_tensor(exact_log_normalizer(kappa.numpy(), 16), dtype=torch.float32)
    wanted = heads[which](features).detach() / 0.1 + bias
    difference = logits(head, features, 0.1) - wanted  # equal up to what softmax removes
    assert float((difference - difference.mean()).abs().max()) < 5e-3


def test_plugin_msn_head_shares_one_set_of_prototypes(original, features, tmp_path):
    mlps = {p: original.shake(original.Head(), i) for i, p in enumerate(("", "momentum_"))}
    state = {"prototypes.weight_v": torch.randn(24, 16), "prototypes.weight_g": torch.ones(24, 1)}
    for prefix, mlp in mlps.items():
        state |= original.prefixed(f"{prefix}backbone.", original.ViT())
        state |= original.prefixed(f"{prefix}head.mlp.", mlp.mlp)
    kwargs = {"normalization": "l2", "centering": "sinkhorn", "teacher_temperature": 0.025}
    cfg = {"method": "msn", "method_kwargs": kwargs}
    path = save(tmp_path, {"state_dict": state, "dinovmf_plugin": {"cfg": cfg}}, "a.ckpt")
    for which, prefix in (("teacher", "momentum_"), ("student", "")):
        head, settings = load_head(path, which=which)
        z = F.normalize(mlps[prefix].mlp(features), dim=-1)
        cosine = z @ F.normalize(state["prototypes.weight_v"], dim=-1).T
        torch.testing.assert_close(logits(head, features), cosine, **TOLERANCE)
        assert settings.method == "msn"
        assert settings.assumed == ("student_temperature",)


@pytest.mark.parametrize("flat", [False, True])
def test_solo_learn_settings_come_from_args_json(original, features, tmp_path, flat):
    source = original.shake(original.Head(bn=True), 3)
    state = original.prefixed("momentum_head.", source)
    state |= original.prefixed("momentum_backbone.", original.ViT())
    path = save(tmp_path, {"state_dict": state}, "run.ckpt")
    kwargs = {"student_temperature": 0.2, "teacher_temperature": 0.06, "norm_last_layer": False}
    args = {"method": "dino", **(kwargs if flat else {"method_kwargs": kwargs})}
    (tmp_path / "args.json").write_text(json.dumps(args))
    head, settings = load_head(path)
    torch.testing.assert_close(logits(head, features), source(features), **TOLERANCE)
    assert (settings.student_temperature, settings.teacher_temperature) == (0.2, 0.06)
    assert settings.normalization == "none"
    assert settings.assumed == ("centering",)
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"args\.json is not valid JSON"):
        load_head(path)


def test_files_without_a_usable_head(original, plugin_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"file\.pth holds no projection head"):
        load_head(save(tmp_path, original.ViT().state_dict()))
    no_bottleneck = {"teacher": {"head.mlp.0.weight": torch.ones(4, 4)}}  # iBOT, bottleneck_dim=0
    with pytest.raises(ValueError, match=r"holds only mlp\.0\.weight: a head needs"):
        load_head(save(tmp_path, no_bottleneck))
    source = original.shake(original.Head(bn=True), 3)
    layer_norm = {f"head.{k}": v for k, v in source.state_dict().items() if "running" not in k}
    with pytest.raises(ValueError, match=r"no DINO head; these tensors differ: mlp\.1\.bias"):
        load_head(save(tmp_path, {"teacher": layer_norm}))
    with pytest.raises(ValueError, match="act_in_head='relu'"):
        load_head(dino_file(tmp_path, source, act_in_head="relu"))
    _, _, content = plugin_checkpoint
    silent = {"state_dict": content["state_dict"], "dinovmf_plugin": {"cfg": {}}}
    with pytest.raises(ValueError, match=r"does not tell method_kwargs\.normalization"):
        load_head(save(tmp_path, silent, "b.ckpt"))
