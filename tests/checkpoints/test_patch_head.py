"""A head of the patches' own: read back, exported, imported, started from; CLS is what is read by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinovmf_plugin.checkpoints import load_head
from dinovmf_plugin.checkpoints.layouts import read_weights
from dinovmf_plugin.checkpoints.transfer import export_weights, import_weights
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.training.resuming import compare_configs

APART = {
    "method_kwargs.patch_head": "separate",
    "method_kwargs.num_patch_prototypes": 24,
    "method_kwargs.teacher_patch_temperature": 0.05,
    "backbone.kwargs.patch_size": 8,
}


@pytest.fixture
def trained(tiny_cfg, crop_loader, build, fit, tmp_path) -> Any:
    """A module after three steps, and its checkpoint."""
    module = build(tiny_cfg("ibot_vmf", max_epochs=1, **APART), depth=None)
    path = tmp_path / "run.ckpt"
    fit(module, crop_loader(steps=3)).save_checkpoint(path)
    return module, path


def _same(head: Any, source: Any) -> None:
    own, wanted = head.state_dict(), source.state_dict()
    assert own.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(own[name], value), name


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_checkpoint__both_heads(trained, which):
    module, path = trained
    of = "momentum_" if which == "teacher" else ""
    head, settings = load_head(path, which=which)
    _same(head, getattr(module, f"{of}head"))
    assert (head.last_layer.num_prototypes, settings.patch_prototypes) == (32, "separate")
    assert settings.teacher_temperature == 0.07
    patch, settings = load_head(path, which=which, tokens="patch")
    _same(patch, getattr(module, f"{of}patch_head"))
    assert (patch.last_layer.num_prototypes, patch.last_layer.normalization) == (24, "vmf")
    assert settings.teacher_temperature == 0.05  # hence the concentrations of the patches
    assert not torch.equal(
        module.patch_head.mlp[0].weight, module.momentum_patch_head.mlp[0].weight
    )


def test_analysis__reads_the_head_of_cls(trained):
    module, path = trained
    network = load_network(path, head=True)
    _same(network.mixture_head[0], module.momentum_head)
    assert network.center is not None
    assert torch.equal(network.center, module.centering.center.flatten())


def test_export_and_import__keep_both(trained, tmp_path):
    module, path = trained
    export_weights(path, tmp_path / "e", with_projection_head=True)
    import_weights(path, tmp_path / "i" / "w.safetensors", source="solo")
    for file in (tmp_path / "e", tmp_path / "i" / "w.safetensors"):
        _same(load_head(file)[0], module.momentum_head)
        patch, settings = load_head(file, tokens="patch")
        _same(patch, module.momentum_patch_head)
        assert settings.teacher_temperature == 0.05
        assert load_network(file, head=True).mixture_head[1].teacher_temperature == 0.07


def test_init_from__takes_the_head_or_leaves_it(trained, tiny_cfg, build):
    module, path = trained
    start = {"method_kwargs.init_from": str(path)}
    again = build(tiny_cfg("ibot_vmf", **APART, **start), seed=1)
    for head in (again.patch_head, again.momentum_patch_head):
        _same(head, module.momentum_patch_head)
    _same(again.head, module.momentum_head)
    shared = build(tiny_cfg("ibot_vmf", **{"backbone.kwargs.patch_size": 8}, **start), seed=1)
    _same(shared.head, module.momentum_head)


def test_init_from__file_without_patch_head__keeps_a_new_one(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    patch = {"backbone.kwargs.patch_size": 8}
    module = build(tiny_cfg("ibot_vmf", max_epochs=1, **patch), depth=None)
    path = tmp_path / "shared.ckpt"
    fit(module, crop_loader(steps=1)).save_checkpoint(path)
    again = build(tiny_cfg("ibot_vmf", **APART, **{"method_kwargs.init_from": str(path)}), seed=1)
    _same(again.head, module.momentum_head)
    _same(again.momentum_patch_head, again.patch_head)
    assert again.patch_head.last_layer.num_prototypes == 24


def test_dinov2_training_file__both_heads(trained, tmp_path):
    """``teacher_checkpoint.pth`` holds ``backbone.*``, ``dino_head.*`` and ``ibot_head.*``."""
    module, _ = trained
    parts = {
        "backbone": module.momentum_backbone,
        "dino_head": module.momentum_head,
        "ibot_head": module.momentum_patch_head,
    }
    teacher = {f"{p}.{k}": v for p, net in parts.items() for k, v in net.state_dict().items()}
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": teacher}, path)
    assert set(read_weights(path).backbone) == set(module.momentum_backbone.state_dict())
    for tokens, source in (("cls", module.momentum_head), ("patch", module.momentum_patch_head)):
        head, settings = load_head(path, tokens=tokens)
        _same(head, source)
        assert settings.patch_prototypes == "separate"
        assert settings.normalization == "none"


def test_resume__with_another_head_is_refused_and_old_checkpoints_are_not():
    checkpoint = {"loops": {}}
    old = {"method": "ibot", "method_kwargs": {}}
    new = {"method": "ibot", "method_kwargs": {"patch_head": "shared", "koleo_weight": 0.0}}
    assert compare_configs(checkpoint, old, new) is None
    new["method_kwargs"]["patch_head"] = "separate"
    with pytest.raises(ValueError, match="patch_head='separate' differs from the checkpoint's"):
        compare_configs(checkpoint, old, new)
