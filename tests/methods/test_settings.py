"""Bad values in a config: one sentence that names the key, the value and what would be right."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from dinovmf_plugin.methods.settings import DINOSettings
from dinovmf_plugin.runs.settings import read


def _read(**kwargs) -> DINOSettings:
    return read(DINOSettings, OmegaConf.create(kwargs), "method_kwargs.")


def test_defaults__are_dinos():
    settings = _read()
    assert settings == DINOSettings()
    assert (settings.normalization, settings.centering) == ("none", "logit")
    assert (settings.student_temperature, settings.num_prototypes) == (0.1, 65536)


def test_values__of_the_declared_types():
    settings = _read(num_prototypes=64, clip_grad=3, final_weight_decay=0)
    assert settings.num_prototypes == 64
    assert isinstance(settings.clip_grad, float)
    assert settings.final_weight_decay == 0.0


BAD_VALUES = {
    "normalization": ("cosine", ["'cosine'", "none, l2 or vmf"]),
    "centering": ("mean", ["'mean'", "logit, probability or sinkhorn"]),
    "init_which": ("both", ["'both'", "teacher or student"]),
    "proj_hidden_dim": (0, ["=0 ", "a whole number of at least 1"]),
    "proj_output_dim": (0, ["=0 ", "a whole number of at least 1"]),
    "num_prototypes": (-5, ["=-5 ", "a whole number of at least 1"]),
    "proj_num_layers": (0, ["=0 ", "a whole number of at least 1"]),
    "sinkhorn_iterations": (0, ["=0 ", "a whole number of at least 1"]),
    "monitor_every": (0, ["=0 ", "a whole number of at least 1"]),
    "warmup_teacher_temperature_epochs": (-1, ["=-1 ", "a whole number of at least 0"]),
    "clip_grad": (-0.3, ["=-0.3 ", "of at least 0"]),
    "freeze_last_layer": (-1, ["=-1 ", "a whole number of at least 0"]),
    "prototype_spread": (-1.0, ["=-1.0 ", "of at least 0"]),
    "normalizer_order": (3, ["=3 ", "from 0 to 2"]),
    "center_momentum": (1.0, ["=1.0 ", "of at least 0 and below 1"]),
    "final_weight_decay": (-0.1, ["=-0.1 ", "from 0 to 100"]),
    "student_temperature": (0.0, ["=0.0 ", "number above 0"]),
    "teacher_temperature": (float("nan"), ["=nan ", "number above 0"]),
    "warmup_teacher_temperature": (-0.04, ["=-0.04 ", "number above 0"]),
}


@pytest.mark.parametrize(
    ("normalization", "centering"), [("none", "logit"), ("l2", "logit"), ("vmf", "probability")]
)
def test_center_raw_scores__where_it_would_do_nothing(normalization, centering):
    with pytest.raises(
        ValueError, match="center_raw_scores=True has no meaning with normalization="
    ):
        _read(normalization=normalization, centering=centering, center_raw_scores=True)
    _read(normalization="vmf", centering="logit", center_raw_scores=True)


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_value__named(key):
    value, words = BAD_VALUES[key]
    with pytest.raises(ValueError) as caught:
        _read(**{key: value})
    message = str(caught.value)
    assert f"method_kwargs.{key}" in message
    for word in words:
        assert word in message, message
    assert "\n" not in message


WRONG_TYPES = {
    "num_prototypes": "many",
    "clip_grad": "strong",
    "use_bn_in_head": "perhaps",
    "stop_on_collapse": "yes",
    "monitor_every": True,
    "sinkhorn_iterations": "3",
    "normalization": None,
    "center_momentum": [0.9],
    "freeze_last_layer": 1.5,
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_wrong_type__named(key):
    with pytest.raises(ValueError) as caught:
        _read(**{key: WRONG_TYPES[key]})
    message = str(caught.value)
    assert f"method_kwargs.{key}" in message
    assert str(WRONG_TYPES[key]) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("normalisation", "normalization"),
        ("centring", "centering"),
        ("num_prototype", "num_prototypes"),
        ("studnt_temperature", "student_temperature"),
    ],
)
def test_unknown_key__did_you_mean(key, suggestion):
    with pytest.raises(ValueError, match=rf"method_kwargs\.{key} .*did you mean {suggestion}\?"):
        _read(**{key: 1})


def test_unknown_key_like_no_other__known_keys_listed():
    with pytest.raises(ValueError, match=r"method_kwargs\.xyzzy .*known keys are .*num_prototypes"):
        _read(xyzzy=1)


@pytest.mark.parametrize("key", ["teacher_temperature", "warmup_teacher_temperature"])
@pytest.mark.parametrize("value", [0.1, 0.3])
def test_teacher_not_sharper_than_the_student__refused(key, value):
    with pytest.raises(
        ValueError, match=rf"{key}={value} must be lower than student_temperature=0.1"
    ):
        _read(**{key: value})


def test_vmf_with_two_dimensions__refused():
    with pytest.raises(ValueError, match=r"proj_output_dim=2 .*normalization=vmf: at least 3"):
        _read(normalization="vmf", proj_output_dim=2)
    assert _read(normalization="vmf", proj_output_dim=3).proj_output_dim == 3
    assert _read(normalization="l2", proj_output_dim=2).proj_output_dim == 2


# ---- outside method_kwargs: the whole method refuses before it builds a network ------------------

BAD_CONFIGS = [
    ("scheduler.name", "step", ["scheduler.name='step'", "dino_vmf", "warmup_cosine or none"]),
    ("optimizer.name", "sgdw", ["optimizer.name='sgdw'", "adamw"]),
    ("momentum.base_tau", 1.2, ["momentum.base_tau=1.2", "[0, 1]"]),
    ("momentum.base_tau", -0.1, ["momentum.base_tau=-0.1", "[0, 1]"]),
    ("momentum.final_tau", 0.5, ["momentum.final_tau=0.5", "[0.99, 1]"]),
    ("scheduler.warmup_epochs", 3, ["scheduler.warmup_epochs=3", "[0, 2]"]),
    ("strategy", "fsdp", ["strategy='fsdp'", "dino_vmf", "strategy=ddp"]),
    ("strategy", "deepspeed_stage_3", ["strategy='deepspeed_stage_3'", "strategy=ddp"]),
    ("momentum.classifier", True, ["momentum.classifier=True", "main_linear"]),
    ("method_kwargs.teacher_temperature", 0.2, ["teacher_temperature=0.2", "student"]),
    ("method_kwargs.normalisation", "l2", ["normalisation", "did you mean normalization?"]),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD_CONFIGS)
def test_method__bad_config__named_before_anything_is_built(tiny_cfg, build, key, value, words):
    cfg = tiny_cfg(**{key: value, "backbone.kwargs.img_size": "not built"})
    with pytest.raises(ValueError) as caught:
        build(cfg)
    for word in words:
        assert word in str(caught.value)


def test_one_crop_per_image__refused(tiny_cfg, build):
    cfg = tiny_cfg(**{"data.num_large_crops": 1, "data.num_small_crops": 0})
    with pytest.raises(ValueError, match="give one crop per image, but dino_vmf compares views"):
        build(cfg)


def test_unknown_method__choices_named(tiny_cfg, build):
    with pytest.raises(ValueError, match=r"method='dino_vfm' is unknown: choose one of .*dino_vmf"):
        build(tiny_cfg("dino_vfm"))


def test_method__resolved_settings_are_written_back(tiny_cfg, build):
    """The config that a checkpoint carries must say everything, also what was a default."""
    module = build(tiny_cfg("dino_vmf"))
    kwargs = OmegaConf.to_container(module.cfg.method_kwargs)
    assert set(kwargs) == {field.name for field in dataclasses.fields(DINOSettings)}
    assert kwargs["normalization"] == "vmf"
    assert kwargs["centering"] == "probability"
    assert read(DINOSettings, OmegaConf.create(kwargs), "method_kwargs.") == module.settings


# ---- the network and the crops ---------------------------------------------------------------------


def _crops(*sizes):
    rrc = {"crop_min_scale": 0.5, "crop_max_scale": 1.0}
    return [{"crop_size": size, "num_crops": 2, "rrc": rrc} for size in sizes]


@pytest.mark.parametrize("method", ["dino_vmf", "ibot", "msn"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.kwargs.in_chans", 1, r"backbone.kwargs.in_chans=1 .*RGB, 3 channels"),
        ("backbone.kwargs.global_pool", "avg", r"global_pool='avg' is not supported: .*'token'"),
        (
            "backbone.kwargs.class_token",
            False,
            r"class_token=False is not supported: .* needs True",
        ),
        (
            "backbone.kwargs.act_layer",
            "relu",
            r"act_layer='relu' is not supported: no stored weight",
        ),
        ("augmentations", _crops(32, 8), r"crop_size=8 is smaller than one patch .*patch_size=16"),
    ],
)
def test_network__that_could_not_be_evaluated_or_fed__is_named(
    tiny_cfg, build, method, key, value, message
):
    cfg = tiny_cfg(method, **{"backbone.kwargs.patch_size": 16, key: value})
    if method == "msn":
        del cfg.method_kwargs["freeze_last_layer"]
    with pytest.raises(ValueError, match=message) as error:
        build(cfg)
    assert "\n" not in str(error.value)


def test_ibot__a_grid_of_one_patch__is_named(tiny_cfg, build):
    cfg = tiny_cfg("ibot", **{"backbone.kwargs.patch_size": 32, "augmentations": _crops(32)})
    with pytest.raises(
        ValueError, match=r"crop_size=32 is a grid of 1 x 1 patches .*2 x 2 are needed"
    ):
        build(cfg)
    build(tiny_cfg("dino_vmf", **{"backbone.kwargs.patch_size": 32, "augmentations": _crops(32)}))
