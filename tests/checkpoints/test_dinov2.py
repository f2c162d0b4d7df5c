"""DINOv2's published layout: registers, SwiGLU, chunked blocks; written from its formulae."""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.checkpoints.layouts import read_weights
from dinovmf_plugin.checkpoints.transfer import export_weights, import_weights
from dinovmf_plugin.core.vit import forward_tokens
from dinovmf_plugin.evaluation.finetuning.trainer import build_classifier
from dinovmf_plugin.features.extraction import FeatureSpec, backbone_features

DIM, HEADS, DEPTH, PATCH, GRID, HIDDEN = 192, 3, 2, 8, 4, 96
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def weights(registers, swiglu, chunked):
    """A state dict under DINOv2's names (dinov2/models/vision_transformer.py)."""
    torch.manual_seed(4)
    shapes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 1 + GRID * GRID, DIM),
        "mask_token": (1, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, DIM)
    for i in range(DEPTH):
        block = f"blocks.{i // 2}.{i}." if chunked else f"blocks.{i}."
        mlp = (
            {"mlp.w12": (2 * HIDDEN, DIM), "mlp.w3": (DIM, HIDDEN)}
            if swiglu
            else {"mlp.fc1": (HIDDEN, DIM), "mlp.fc2": (DIM, HIDDEN)}
        )
        layers = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), **mlp}
        for name, shape in layers.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + name] = (DIM,)
        shapes |= {f"{block}ls1.gamma": (DIM,), f"{block}ls2.gamma": (DIM,)}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def positions(w, rows, cols, registers):
    """With registers the hub's models antialias and take sizes; without, a tenth of a cell is added."""
    pos = w["pos_embed"]
    if (rows, cols) == (GRID, GRID):
        return pos
    grid = pos[:, 1:].reshape(1, GRID, GRID, DIM).permute(0, 3, 1, 2)
    if registers:
        grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", antialias=True)
    else:
        scale = ((rows + 0.1) / GRID, (cols + 0.1) / GRID)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def original(w, images):
    """Tokens after the final norm: CLS, registers, patches."""
    w = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): v for name, v in w.items()}
    registers = w.get("register_tokens")
    proj = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    x = F.conv2d(images, *proj, stride=PATCH)
    rows, cols = x.shape[-2:]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + positions(w, rows, cols, registers is not None)
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for i in range(DEPTH):
        b = f"blocks.{i}."
        n, t, _ = x.shape
        q, k, v = linear(norm(x, b + "norm1"), b + "attn.qkv").view(n, t, 3, HEADS, -1).unbind(2)
        scores = torch.einsum("bihc,bjhc->bhij", q, k) * (DIM // HEADS) ** -0.5
        mixed = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).reshape(n, t, DIM)
        x = x + w[b + "ls1.gamma"] * linear(mixed, b + "attn.proj")
        y = norm(x, b + "norm2")
        if f"{b}mlp.w12.weight" in w:
            gate, value = linear(y, b + "mlp.w12").chunk(2, dim=-1)
            y = linear(F.silu(gate) * value, b + "mlp.w3")
        else:
            y = linear(F.gelu(linear(y, b + "mlp.fc1")), b + "mlp.fc2")
        x = x + w[b + "ls2.gamma"] * y
    return norm(x, "norm")


@pytest.mark.parametrize(
    ("registers", "swiglu", "chunked"),
    [(4, False, False), (4, True, True), (0, True, False), (0, False, False)],
)
@torch.no_grad()
def test_dinov2_file__every_token__as_the_original(tmp_path, registers, swiglu, chunked):
    w = weights(registers, swiglu, chunked)
    path = tmp_path / "dinov2.pth"
    torch.save(w, path)
    vit, report = load_backbone(path)
    assert report.source == "dinov2"
    assert report.unexpected == ("mask_token",)
    for size in (32, 24, 48):
        images = torch.randn(2, 3, size, size)
        wanted = original(w, images)
        assert wanted.shape[1] == 1 + registers + (size // PATCH) ** 2
        torch.testing.assert_close(forward_tokens(vit, images), wanted, **TOLERANCE)
        feature = backbone_features(vit, images, [FeatureSpec(avgpool=True)])[0]
        pooled = wanted[:, 1 + registers :].mean(1)
        torch.testing.assert_close(feature, torch.cat([wanted[:, 0], pooled], 1), **TOLERANCE)

    out, folder = tmp_path / "i" / "w.safetensors", tmp_path / "e"
    import_weights(path, out, source="dinov2")
    export_weights(out, folder)
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(model(images), original(w, images)[:, 0], **TOLERANCE)
    again, _ = load_backbone(folder)
    small = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(forward_tokens(again, small), original(w, small), **TOLERANCE)


def test_timm_file_with_registers__positions_of_patches_alone__are_recognized(tmp_path):
    """timm's DINOv2 models have ``no_embed_class``, which a bare state dict does not tell."""
    name, sizes = "vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}
    source = timm.create_model(name, num_classes=0, **sizes).eval()
    path = tmp_path / "reg.pth"
    torch.save(source.state_dict(), path)
    vit, report = load_backbone(path)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(forward_tokens(vit, images), source.forward_features(images))
    assert vit.no_embed_class
    assert (report.missing, report.unexpected) == ((), ())


def test_training_checkpoint_of_dinov2__teacher_with_its_head(tmp_path):
    w = weights(4, False, True)
    head = {"mlp.0.weight": torch.randn(8, DIM), "mlp.0.bias": torch.zeros(8)}
    state = {f"backbone.{k}": v for k, v in w.items()}
    state |= {f"dino_head.{k}": v for k, v in head.items()}
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": state}, path)
    vit, report = load_backbone(path)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(forward_tokens(vit, images), original(w, images), **TOLERANCE)
    assert (report.source, report.which) == ("dinov2", "teacher")


@torch.no_grad()
def test_gated_network_with_registers__fine_tuning_starts_from_it(tmp_path):
    w = weights(4, True, False)
    path = tmp_path / "dinov2.pth"
    torch.save(w, path)
    options = {"img_size": 32, "drop_path": 0.0, "init_scale": 1.0}
    model = build_classifier(read_weights(path), 7, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = original(w, images)
    torch.testing.assert_close(model.forward_features(images), wanted, **TOLERANCE)
    assert model(images).shape == (2, 7)
