"""Which parameters the optimizer gets, and which of them decay."""

from __future__ import annotations

import pytest


def test_groups__no_decay_on_biases_and_vectors(tiny_cfg, build):
    module = build(tiny_cfg())
    groups = {group["name"]: group for group in module.parameter_groups()}
    assert set(groups) == {
        "backbone",
        "backbone_no_decay",
        "head",
        "head_no_decay",
        "classifier_no_decay",
    }
    names = {id(p): name for name, p in module.named_parameters()}
    grouped = [names[id(p)] for group in groups.values() for p in group["params"]]
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)  # each once, none forgotten
    for name, group in groups.items():
        decay = not name.endswith("_no_decay")
        assert group["decay"] is decay
        for parameter in group["params"]:
            own = names[id(parameter)]
            if not own.startswith("classifier"):
                assert decay is not (own.endswith("bias") or parameter.ndim <= 1), own
    # official DINO decays the magnitudes, the CLS token and the position embeddings too: 2-d and more
    decayed = {names[id(p)] for n in ("backbone", "head") for p in groups[n]["params"]}
    assert {
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
        "backbone.cls_token",
        "backbone.pos_embed",
    } <= decayed


@pytest.mark.parametrize(("switch", "group"), [(True, "head"), (False, "head_no_decay")])
def test_groups__decay_magnitudes_switch(tiny_cfg, build, switch, group):
    module = build(tiny_cfg(**{"method_kwargs.decay_magnitudes": switch}))
    groups = {g["name"]: g["params"] for g in module.parameter_groups()}
    found = [n for n, ps in groups.items() if any(p is module.head.last_layer.weight_g for p in ps)]
    assert found == [group]


def test_groups__l2_magnitudes_are_not_optimized(tiny_cfg, build):
    module = build(tiny_cfg(**{"method_kwargs.normalization": "l2"}))
    grouped = [p for g in module.parameter_groups() for p in g["params"]]
    assert not any(p is module.head.last_layer.weight_g for p in grouped)
