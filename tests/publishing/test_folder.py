"""The exported folder: what timm and huggingface_hub make of it, and the mixture in it."""

from __future__ import annotations

import json
import math

import huggingface_hub
import mpmath
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch.nn import functional as F

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.checkpoints.transfer import export_weights
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.publishing.cli import export_main

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def _images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
NETWORKS = {
    "vit": ("vit_nano", {}),
    "registers": ("vit_nano", {"reg_tokens": 4}),
    "registers, positions of patches": ("vit_nano", {"reg_tokens": 2, "no_embed_class": True}),
    "resnet18": ("resnet18", {}),
    "convnext_tiny": (
        "convnext_tiny",
        {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "drop_path_rate": 0.1},
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
@torch.no_grad()
def test_timm__gives_our_features(stored_run, tmp_path, case):
    name, kwargs = NETWORKS[case]
    if name == "vit_nano":
        backbone = VisionTransformer(num_classes=0, **VIT, **kwargs)
        told = {**VIT, **kwargs, "drop_path_rate": 0.1}
    else:
        backbone, told = timm.create_model(name, num_classes=0, **kwargs), kwargs
    run = stored_run(backbone=backbone, config={"backbone": {"name": name, "kwargs": told}})
    export_weights(run.path, tmp_path / "e")
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True).eval()
    wanted = run.teacher(_images())
    torch.testing.assert_close(model(_images()), wanted, **EXACT)
    torch.testing.assert_close(load_backbone(run.path)[0](_images()), wanted, **EXACT)
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert (config["num_classes"], config["num_features"]) == (0, wanted.shape[1])
    assert config["global_pool"] == ("token" if name == "vit_nano" else "avg")
    assert not [key for key in config["model_args"] if "drop" in key]
    own = timm.data.resolve_model_data_config(model)
    assert (own["mean"], own["interpolation"]) == ([0.1, 0.2, 0.3], "bicubic")
    assert tuple(own["input_size"]) == (3, 32, 32)


def test_a_vit_without_class_token__is_refused_by_name(stored_run, tmp_path):
    kwargs = {**VIT, "class_token": False, "global_pool": "avg"}
    run = stored_run(
        backbone=VisionTransformer(num_classes=0, **kwargs),
        config={"backbone": {"name": "vit_nano", "kwargs": kwargs}},
    )
    with pytest.raises(ValueError, match=r"backbone\.kwargs\.class_token=False is not supported"):
        export_weights(run.path, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def _log_constant(kappa: float, dim: int) -> float:
    """log C_p(kappa) - log C_p(0) from the Bessel function itself, to 30 digits."""
    with mpmath.workdps(30):
        nu = mpmath.mpf(dim) / 2 - 1
        k = mpmath.mpf(kappa)
        density = nu * mpmath.log(k) - mpmath.log(mpmath.besseli(nu, k))
        return float(density - nu * mpmath.log(2) - mpmath.loggamma(mpmath.mpf(dim) / 2))


@pytest.mark.parametrize("normalization", ["vmf", "none", "l2"])
@torch.no_grad()
def test_mixture_file__holds_the_components(stored_run, tmp_path, normalization):
    run = stored_run(normalization)
    export_weights(run.path, tmp_path / "e")
    file = load_file(tmp_path / "e" / "model.mixture.safetensors")
    assert set(file) == {"prototypes", "kappa", "log_normalizer", "temperature", "center"}
    layer = run.head.last_layer
    weight = layer.weight_g * F.normalize(layer.weight_v, dim=1)
    torch.testing.assert_close(file["prototypes"], weight, **EXACT)
    torch.testing.assert_close(file["kappa"], weight.norm(dim=1) / 0.04, rtol=1e-5, atol=0)
    torch.testing.assert_close(file["center"], run.center, rtol=0, atol=0)
    assert math.isclose(file["temperature"].item(), 0.04, rel_tol=1e-6)
    wanted = torch.zeros(24)
    if normalization == "vmf":
        wanted = torch.tensor([_log_constant(kappa, 8) for kappa in file["kappa"].tolist()])
    torch.testing.assert_close(file["log_normalizer"], wanted, rtol=1e-4, atol=1e-4)
    y = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    logits = y @ file["prototypes"].T / file["temperature"] + file["log_normalizer"]
    torch.testing.assert_close(logits, layer(y, 0.04), rtol=1e-5, atol=1e-5)
    network = load_network(tmp_path / "e", head=True)
    torch.testing.assert_close(network.center, run.center, rtol=0, atol=0)
    torch.testing.assert_close(network.prototypes.weight(), weight, **EXACT)


def test_separate_patch_prototypes__are_in_the_mixture_file(stored_run, tmp_path):
    run = stored_run()
    content = torch.load(run.path, weights_only=True)
    patch = torch.randn(24, 8, generator=torch.Generator().manual_seed(9))
    content["state_dict"]["momentum_head.last_layer2.weight_v"] = patch
    content["state_dict"]["momentum_head.last_layer2.weight_g"] = torch.full((24, 1), 2.0)
    torch.save(content, run.path)
    export_weights(run.path, tmp_path / "e")
    file = load_file(tmp_path / "e" / "model.mixture.safetensors")
    torch.testing.assert_close(file["patch_prototypes"], 2 * F.normalize(patch, dim=1), **EXACT)
    torch.testing.assert_close(file["patch_kappa"], torch.full((24,), 50.0), rtol=1e-5, atol=0)
    assert not torch.equal(file["patch_log_normalizer"], file["log_normalizer"])


def test_card__is_read_by_the_hub_and_tells_the_training_without_places(stored_run, tmp_path):
    run = stored_run()
    arguments = [str(run.path), "--output", str(tmp_path / "e"), "--license", "cc-by-nc-4.0"]
    assert export_main(arguments) == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "e" / "README.md")
    assert (card.data.library_name, card.data.license) == ("timm", "cc-by-nc-4.0")
    assert {"dino_vmf", "arxiv:2405.10939", "timm"} <= set(card.data.tags)
    text = card.content
    for told in (
        "| Method | dino_vmf |",
        "| Steps of the optimizer | 1234 |",
        "| Epochs, as planned | 7 |",
        "| Backbone | vit_nano |",
        "| Optimizer | adamw |",
        "| Learning rate | 0.0005 |",
        "https://arxiv.org/abs/2405.10939",
        "centering: probability",
        "No evaluation of this network lay beside its file",
        "is cc-by-nc-4.0, as its exporter says",
    ):
        assert told in text, told
    for private in ("anna", "secret-name", "wandb"):
        assert private not in text + (tmp_path / "e" / "config.json").read_text()
    kappa = run.head.last_layer.weight_g.detach().abs().squeeze() / 0.04
    low, median, high = (
        f"{float(v):.3g}" for v in torch.quantile(kappa, torch.tensor([0.05, 0.5, 0.95]))
    )
    assert f"| kappa | {low} | {median} | {high} |" in text
    # an export of the export keeps what is known of the training
    export_weights(tmp_path / "e", tmp_path / "again")
    assert "| Steps of the optimizer | 1234 |" in (tmp_path / "again" / "README.md").read_text()
    first, second = (load_file(tmp_path / x / "model.mixture.safetensors") for x in ("e", "again"))
    assert all(torch.equal(first[key], second[key]) for key in {*first, *second})


def test_head__is_left_out_asked_for_or_refused(stored_run, tmp_path):
    run = stored_run()
    export_weights(run.path, tmp_path / "bare", with_projection_head=False)
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    assert "## Mixture" not in (tmp_path / "bare" / "README.md").read_text()
    export_weights(run.path, tmp_path / "full")
    # a network without head must not inherit that of another
    with pytest.raises(
        FileExistsError, match=r"model\.head\.safetensors belongs to another export"
    ):
        export_weights(run.path, tmp_path / "full", with_projection_head=False, overwrite=True)
    with pytest.raises(ValueError, match="no projection head"):
        export_weights(tmp_path / "bare", tmp_path / "x", with_projection_head=True)
    with pytest.raises(FileExistsError, match="exists already"):
        export_weights(run.path, tmp_path / "full")


def test_license__of_another_form_is_one_sentence(stored_run, tmp_path, capsys):
    run = stored_run()
    with pytest.raises(SystemExit) as ended:
        export_main([str(run.path), "--output", str(tmp_path / "e"), "--license", "My Own"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --license My Own is no identifier of the Hub")
    assert not (tmp_path / "e").exists()
