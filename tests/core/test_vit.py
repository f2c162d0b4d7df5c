"""ViT functions against timm's own forward, an independent bicubic resize, and hooks."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dinovmf_plugin.core import vit as backbones


def _vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
    vit = VisionTransformer(**{**sizes, "num_classes": 0, **kwargs}).eval()
    with torch.no_grad():  # timm's initial position embeddings and CLS are too small to matter
        for name, parameter in vit.named_parameters():
            if "pos_embed" in name or "token" in name:
                parameter.normal_()
    return vit


def _images(height: int = 64, width: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _readout(tokens: torch.Tensor) -> torch.Tensor:
    """A number that depends on CLS: its sum and its norm do not, after the final LayerNorm."""
    weights = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(3))
    return (tokens[:, 0] @ weights).sum()


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"pre_norm": True},
        {"qk_norm": True, "init_values": 0.1},
        {"dynamic_img_size": True},
    ],
)
def test_forward_tokens__native_size__equals_timm(kwargs):
    vit = _vit(**kwargs)
    images = _images()
    tokens = backbones.forward_tokens(vit, images)
    torch.testing.assert_close(tokens, vit.forward_features(images))
    assert tokens.shape == (2, 1 + kwargs.get("reg_tokens", 0) + 16, 24)
    without = backbones.forward_tokens(vit, images, final_norm=False)
    torch.testing.assert_close(vit.norm(without), tokens)


def _bicubic(grid: np.ndarray, rows: int, cols: int, scale: tuple[float, float]) -> np.ndarray:
    """Cubic convolution (a = -0.75) without antialiasing, edges repeated: ``(h, w, D)`` resized."""

    def weights(t: float) -> list[float]:
        a, out = -0.75, []
        for x in (1 + t, t, 1 - t, 2 - t):
            if x <= 1:
                out.append((a + 2) * x**3 - (a + 3) * x**2 + 1)
            else:
                out.append(a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a)
        return out

    def along(values: np.ndarray, size: int, factor: float) -> np.ndarray:
        out = np.zeros((size, *values.shape[1:]))
        for i in range(size):
            source = (i + 0.5) / factor - 0.5
            base = int(np.floor(source))
            for offset, weight in zip((-1, 0, 1, 2), weights(source - base), strict=True):
                out[i] += weight * values[min(max(base + offset, 0), len(values) - 1)]
        return out

    resized = along(grid, rows, scale[0])
    return along(resized.swapaxes(0, 1), cols, scale[1]).swapaxes(0, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (48, 112), (71, 64)])
def test_forward_tokens__other_sizes__position_embeddings_resized_as_official_dino(height, width):
    """By scale factor, with 0.1 cells added to the target; the CLS embedding as it is."""
    vit = _vit(dynamic_img_size=True)
    images = _images(height, width)
    rows, cols = height // 16, width // 16
    tokens = backbones.forward_tokens(vit, images)
    assert tokens.shape == (2, 1 + rows * cols, 24)

    pos = vit.pos_embed.detach().double().numpy()[0]
    scale = ((rows + 0.1) / 4, (cols + 0.1) / 4)
    patch_pos = _bicubic(pos[1:].reshape(4, 4, -1), rows, cols, scale).reshape(-1, 24)
    if (rows, cols) == (4, 4):
        patch_pos = pos[1:]
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = x + torch.tensor(patch_pos).float()
    cls = (vit.cls_token + torch.tensor(pos[:1]).float()).expand(2, -1, -1)
    expected = vit.norm(vit.blocks(torch.cat([cls, x], dim=1)))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_forward_tokens__host_model_without_dynamic_size__takes_local_crops():
    """The reason for this module: timm itself refuses another size than ``img_size``."""
    vit = _vit()
    with pytest.raises(AssertionError):
        vit.forward_features(_images(32, 32))
    assert backbones.forward_tokens(vit, _images(32, 32)).shape == (2, 5, 24)


def test_forward_tokens__resized_embedding__gets_gradients():
    vit = _vit()
    _readout(backbones.forward_tokens(vit, _images(32, 32))).backward()
    assert vit.pos_embed.grad[:, 1:].abs().sum() > 0.1
    assert vit.pos_embed.grad[:, :1].abs().sum() > 0.1


def test_forward_tokens__bf16_autocast__close_to_float32():
    vit = _vit()
    for size in (64, 32):
        images = _images(size, size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = backbones.forward_tokens(vit, images)
        torch.testing.assert_close(
            tokens.float(), backbones.forward_tokens(vit, images), rtol=0.1, atol=0.1
        )


def test_forward_tokens__masks__replace_patches_before_position_embeddings():
    vit = _vit()
    images = _images()
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    assert 0 < masks.sum() < 32
    token = torch.randn(24)
    seen = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbones.forward_tokens(vit, images)
    backbones.forward_tokens(vit, images, masks=masks, mask_token=token)
    handle.remove()
    plain, masked = seen
    expected = torch.where(masks[..., None], token + vit.pos_embed[:, 1:], plain[:, 1:])
    torch.testing.assert_close(masked[:, 1:], expected)
    torch.testing.assert_close(masked[:, :1], plain[:, :1])
    for shape in ((1, 1, 24), (1, 24)):
        torch.testing.assert_close(
            backbones.forward_tokens(vit, images, masks=masks, mask_token=token.reshape(shape)),
            backbones.forward_tokens(vit, images, masks=masks, mask_token=token),
        )
    torch.testing.assert_close(
        backbones.forward_tokens(vit, images, masks=torch.zeros_like(masks), mask_token=token),
        backbones.forward_tokens(vit, images),
    )


def test_forward_tokens__keep__patches_keep_their_position_embedding():
    vit = _vit(reg_tokens=1)
    images = _images()
    seen = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbones.forward_tokens(vit, images)
    keep = torch.tensor([14, 0, 7])
    tokens = backbones.forward_tokens(vit, images, keep=keep)
    handle.remove()
    assert tokens.shape == (2, 2 + 3, 24)
    torch.testing.assert_close(seen[1][:, 2:], seen[0][:, 2:][:, keep])
    torch.testing.assert_close(seen[1][:, :2], seen[0][:, :2])


def test_forward_tokens__bad_input__named():
    vit = _vit()
    masks = torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="without a mask_token"):
        backbones.forward_tokens(vit, _images(), masks=masks)
    with pytest.raises(ValueError, match=r"\(2, 9\).*4 x 4 patches need \(2, 16\)"):
        backbones.forward_tokens(vit, _images(), masks=masks[:, :9], mask_token=torch.zeros(24))
    with pytest.raises(ValueError, match="15 x 64 pixels is smaller than one patch of 16 x 16"):
        backbones.forward_tokens(vit, _images(15, 64))


def test_forward_tokens__grad_checkpointing__same_values_and_gradients():
    images = _images()
    gradients = []
    for enable in (False, True):
        vit = _vit()
        vit.set_grad_checkpointing(enable)
        _readout(backbones.forward_tokens(vit, images)).backward()
        gradients.append([p.grad for p in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# ---- blocks and attention ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 32])
def test_intermediate_tokens__equal_the_blocks_outputs_oldest_first(size):
    vit = _vit()
    images = _images(size, size)
    outputs = []
    handles = [b.register_forward_hook(lambda *a: outputs.append(a[2])) for b in vit.blocks]
    last = backbones.forward_tokens(vit, images)
    for handle in handles:
        handle.remove()
    tokens = backbones.intermediate_tokens(vit, images, 2)
    assert len(tokens) == 2
    torch.testing.assert_close(tokens[-1], last)
    torch.testing.assert_close(tokens[0], vit.norm(outputs[1]))
    raw = backbones.intermediate_tokens(vit, images, 3, final_norm=False)
    for mine, theirs in zip(raw, outputs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("n", [0, 4])
def test_intermediate_tokens__impossible_n__named(n):
    with pytest.raises(ValueError, match=f"n={n} blocks were asked for, but the backbone has 3"):
        backbones.intermediate_tokens(_vit(), _images(), n)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}])
@pytest.mark.parametrize("size", [64, 32])
def test_last_attention__is_what_the_block_uses(kwargs, size):
    vit = _vit(**kwargs)
    images = _images(size, size)
    attention = backbones.last_attention(vit, images)
    tokens = 1 + (size // 16) ** 2
    assert attention.shape == (2, 2, tokens, tokens)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, tokens))
    seen = []
    vit.blocks[-1].attn.fused_attn = False
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda *a: seen.append(a[2]))
    backbones.forward_tokens(vit, images)
    torch.testing.assert_close(attention, seen[0], rtol=1e-4, atol=1e-6)


def test_patch_grid__rest_is_cut_off():
    vit = _vit()
    assert backbones.patch_grid(vit, 64, 48) == (4, 3)
    assert backbones.patch_grid(vit, 79, 16) == (4, 1)


# ---- which backbones -----------------------------------------------------------------------------


def test_is_vit__plain_vits_only():
    assert backbones.is_vit(_vit())
    assert not backbones.is_vit(timm.create_model("resnet18", num_classes=0))
    assert not backbones.is_vit(_vit(class_token=False, global_pool="avg"))
    with pytest.raises(ValueError, match=r"backbone Linear is not a plain Vision Transformer"):
        backbones.forward_tokens(nn.Linear(2, 2), _images())


def test_disable_drop_path__teacher_is_deterministic_in_training_mode():
    vit = _vit(drop_path_rate=0.5).train()
    images = _images(batch=8)
    assert not torch.equal(
        backbones.forward_tokens(vit, images), backbones.forward_tokens(vit, images)
    )
    backbones.disable_drop_path(vit)
    assert vit.training
    torch.testing.assert_close(
        backbones.forward_tokens(vit, images), backbones.forward_tokens(vit.eval(), images)
    )


# ---- grids and rules of the position embeddings ----------------------------------------------------


def test_forward_tokens__8_by_2_patches__are_not_4_by_4():
    vit = _vit(img_size=(64, 16), patch_size=8, dynamic_img_size=True)
    assert backbones.position_grid(vit) == (8, 2)
    images = _images(64, 16)
    torch.testing.assert_close(backbones.forward_tokens(vit, images), vit.forward_features(images))
    for height, width in ((32, 32), (64, 32), (128, 24)):
        rows, cols = height // 8, width // 8
        pos = vit.pos_embed.detach().double().numpy()[0, 1:].reshape(8, 2, -1)
        wanted = _bicubic(pos, rows, cols, ((rows + 0.1) / 8, (cols + 0.1) / 2)).reshape(-1, 24)
        _, found = backbones.position_embedding(vit, rows, cols)
        np.testing.assert_allclose(found[0].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_position_grid__neither_the_networks_nor_a_square__is_named():
    vit = _vit()
    vit.pos_embed = nn.Parameter(torch.zeros(1, 1 + 15, 24))
    with pytest.raises(ValueError, match=r"15 patch position .* grid of \(4, 4\) nor a square"):
        backbones.position_grid(vit)


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (3, 3), (6, 6), (7, 7), (3, 7)])
def test_position_rule__msn__is_the_plain_ratio_of_the_sides(rows, cols):
    """MSN resizes by sqrt(n / N), n and N the numbers of patches, without DINO's tenth of a cell."""
    vit = _vit()
    pos = vit.pos_embed.detach().double().numpy()[0, 1:].reshape(4, 4, -1)
    _, as_dino = backbones.position_embedding(vit, rows, cols)
    backbones.resample_positions_as(vit, "msn")
    _, found = backbones.position_embedding(vit, rows, cols)
    if rows == cols:
        ratio = (np.sqrt(rows * cols / 16),) * 2
    else:
        ratio = (rows / 4, cols / 4)
    wanted = _bicubic(pos, rows, cols, ratio).reshape(-1, 24)
    np.testing.assert_allclose(found[0].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert float((found - as_dino).norm() / found.norm()) > 0.01
    with pytest.raises(ValueError, match="rule='ibot' is unknown"):
        backbones.resample_positions_as(vit, "ibot")
