"""Keys of solo-learn's DINO in ``method_kwargs``: what they mean here, and what contradicts."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf


def _settings(tiny_cfg, build, method, **kwargs):
    cfg = tiny_cfg(method)
    if method.startswith("msn"):
        del cfg.method_kwargs.freeze_last_layer
    for key, value in kwargs.items():
        OmegaConf.update(cfg, f"method_kwargs.{key}", value, force_add=True)
    return build(cfg, depth=1)


@pytest.mark.parametrize(
    ("method", "fixed", "expected"),
    [
        ("dino_multicrop", True, "l2"),
        ("dino_multicrop", False, "none"),
        ("ibot", True, "l2"),
        ("msn", True, "l2"),
        ("msn", False, "none"),
        ("dino_vmf", False, "vmf"),
        ("ibot_vmf", False, "vmf"),
        ("msn_vmf", False, "vmf"),
    ],
)
def test_norm_last_layer__is_the_normalization(tiny_cfg, build, method, fixed, expected):
    module = _settings(tiny_cfg, build, method, norm_last_layer=fixed)
    prototypes = module.student_prototypes
    assert prototypes.normalization == module.settings.normalization == expected
    # fixed norms are not trained, as in solo-learn's head
    trained = [n for n, p in prototypes.named_parameters() if p.requires_grad]
    assert ("weight_g" in trained) is (expected != "l2")


@pytest.mark.parametrize(
    ("method", "kwargs", "words"),
    [
        (
            "dino_vmf",
            {"norm_last_layer": True},
            "True fixes .* method=dino_vmf frees: leave it out, or",
        ),
        (
            "dino_multicrop",
            {"norm_last_layer": False, "normalization": "l2"},
            "False frees .*normalization=l2 fixes: leave it out$",
        ),
        (
            "dino_vmf",
            {"norm_last_layer": True, "normalization": "none"},
            "True fixes .*normalization=none frees",
        ),
        ("dino_vmf", {"norm_last_layer": "yes"}, "'yes' must be True or False"),
    ],
)
def test_norm_last_layer__contradiction__one_sentence(tiny_cfg, build, method, kwargs, words):
    with pytest.raises(ValueError, match=rf"method_kwargs\.norm_last_layer={words}"):
        _settings(tiny_cfg, build, method, **kwargs)


def test_norm_last_layer__agrees_with_normalization(tiny_cfg, build):
    module = _settings(tiny_cfg, build, "dino_vmf", norm_last_layer=True, normalization="l2")
    assert module.settings.normalization == "l2"


def test_switches__as_solo_learn_annotates_them(tiny_cfg, build):
    module = _settings(tiny_cfg, build, "dino_vmf", freeze_last_layer=True, clip_grad=False)
    assert (module.settings.freeze_last_layer, module.settings.clip_grad) == (1, 0.0)
    module = _settings(tiny_cfg, build, "dino_vmf", freeze_last_layer=False)
    assert module.settings.freeze_last_layer == 0
