"""The published networks, tiny, written from their formulae under their published tensor names."""

import argparse
import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).unbind(2)
        weights = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(d // self.heads)
        mixed = torch.einsum("bhij,bjhc->bihc", weights.softmax(-1), v)
        return self.proj(mixed.reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        if layer_scale:  # iBOT's optional gammas
            self.gamma_1 = nn.Parameter(torch.ones(dim))
            self.gamma_2 = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x + getattr(self, "gamma_1", 1.0) * self.attn(self.norm1(x))
        hidden = F.gelu(self.mlp.fc1(self.norm2(x)))
        return x + getattr(self, "gamma_2", 1.0) * self.mlp.fc2(hidden)


class OriginalViT(nn.Module):
    """DINO's, iBOT's and MSN's plain ViT; CLS feature after the final LayerNorm."""

    def __init__(self, dim=32, depth=2, heads=2, patch=8, grid=4, layer_scale=False, masked=False):
        super().__init__()
        self.grid, self.patch = grid, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        if masked:  # iBOT's mask token
            self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.ModuleList([Block(dim, heads, layer_scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, rows, cols):
        if (rows, cols) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[0, 1:].T.reshape(1, -1, self.grid, self.grid)
        # both official repositories add a tenth of a patch to the scale against rounding
        scale = ((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images):
        patches = self.patch_embed.proj(images)
        rows, cols = patches.shape[-2:]
        x = torch.cat(
            [self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        x = x + self.positions(rows, cols)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class OriginalHead(nn.Module):
    """DINO's and iBOT's head: MLP, unit sphere, weight-normalized prototypes -> logits."""

    def __init__(
        self, dim=32, k=24, bn=False, layers=3, patch_k=None, shared=False, parametrized=False
    ):
        super().__init__()
        norm = (lambda: [nn.BatchNorm1d(40)]) if bn else list
        if layers == 1:
            self.mlp = nn.Linear(dim, 16)
        else:
            parts = [nn.Linear(dim, 40), *norm(), nn.GELU()]
            for _ in range(layers - 2):
                parts += [nn.Linear(40, 40), *norm(), nn.GELU()]
            self.mlp = nn.Sequential(*parts, nn.Linear(40, 16))
        wrap = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
        self.last_layer = wrap(nn.Linear(16, k, bias=False))
        if shared:
            self.last_layer2 = self.last_layer
        elif patch_k is not None:
            self.last_layer2 = wrap(nn.Linear(16, patch_k, bias=False))

    def forward(self, features, layer="last_layer"):
        return getattr(self, layer)(F.normalize(self.mlp(features), dim=-1))


def msn_fc(dim=32, bn=True):
    """MSN's projection, a Sequential with these published names."""
    layers = [("fc1", nn.Linear(dim, 40)), ("bn1", nn.BatchNorm1d(40)), ("gelu1", nn.GELU())]
    layers += [("fc2", nn.Linear(40, 40)), ("bn2", nn.BatchNorm1d(40)), ("gelu2", nn.GELU())]
    layers += [("fc3", nn.Linear(40, 16))]
    return nn.Sequential(OrderedDict((n, m) for n, m in layers if bn or not n.startswith("bn")))


@torch.no_grad()
def shake(module, seed, unit_magnitudes=False):
    """Fill every tensor with numbers that make a wrong or swapped one visible."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict(keep_vars=True).items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        one = any(
            part in name for part in ("norm", "gamma", "running_var", "weight_g", "original0")
        )
        one = one and name.endswith(("weight", "gamma_1", "gamma_2", "var", "_g", "original0"))
        value.copy_((1 + 0.2 * noise).abs() + 0.1 if one else 0.2 * noise)
        if unit_magnitudes and name.endswith(("weight_g", "original0")):
            value.fill_(1)
    return module.eval()


def prefixed(prefix, module):
    return {prefix + name: value for name, value in module.state_dict().items()}


def training_args(**values):
    """``args`` and ``optimizer`` as the official scripts save them: Namespace and numpy numbers."""
    return {
        "args": argparse.Namespace(arch="vit_small", **values),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "params": [0]}]},
        "epoch": 100,
    }


def pair(kind):
    """``{"teacher": (vit, head), "student": (vit, head)}`` and the checkpoint of project ``kind``."""
    if kind == "dino":
        nets = {
            w: (shake(OriginalViT(), i), shake(OriginalHead(), i + 10)) for i, w in enumerate(NETS)
        }
        content = training_args(teacher_temp=0.05, norm_last_layer=False) | {
            "dino_loss": {"center": torch.zeros(1, 24)}
        }
    elif kind == "ibot":
        nets = {
            w: (
                shake(OriginalViT(layer_scale=True, masked=w == "student"), i),
                shake(OriginalHead(patch_k=20), i + 10, unit_magnitudes=True),
            )
            for i, w in enumerate(NETS)
        }
        content = training_args(teacher_temp=0.07, norm_last_layer=True) | {
            "ibot_loss": {"center": torch.zeros(1, 24)}
        }
    else:
        raise ValueError(kind)
    for which, prefix in (("teacher", ""), ("student", "module.")):  # only the student is in DDP
        vit, head = nets[which]
        content[which] = prefixed(f"{prefix}backbone.", vit) | prefixed(f"{prefix}head.", head)
    return nets, content


def msn(bn=True):
    nets, content = {}, {"opt": {}, "epoch": 3, "temperature": 0.1, "batch_size": 4}
    content["prototypes"] = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    for i, (which, key) in enumerate((("teacher", "target_encoder"), ("student", "encoder"))):
        vit = shake(OriginalViT(), i)
        vit.fc = shake(msn_fc(bn=bn), i + 10)
        nets[which] = (vit, vit.fc)
        content[key] = prefixed("module.", vit)
    return nets, content


NETS = ("teacher", "student")


@pytest.fixture(scope="session")
def original():
    """The published networks and helpers to lay them out as files."""
    return SimpleNamespace(
        ViT=OriginalViT, Head=OriginalHead, shake=shake, prefixed=prefixed, pair=pair, msn=msn
    )


@pytest.fixture(scope="session")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def plugin_checkpoint(original):
    """Training checkpoint of this plugin: (networks by name, content)."""
    nets = {
        name: original.shake(original.ViT(), i) for i, name in enumerate(("teacher", "student"))
    }
    heads = {name: original.shake(original.Head(), i + 10) for i, name in enumerate(nets)}
    state = {"centering.center": torch.zeros(24), "classifier.weight": torch.zeros(5, 32)}
    for which, prefix in (("teacher", "momentum_"), ("student", "")):
        state |= prefixed(f"{prefix}backbone.", nets[which])
        state |= prefixed(f"{prefix}head.", heads[which])
    cfg = {
        "method": "dino_vmf",
        "backbone": {"name": "vit_tiny", "kwargs": {"num_heads": 2, "img_size": 32}},
        "augmentations": [{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}],
        "method_kwargs": {
            "normalization": "vmf",
            "centering": "probability",
            "student_temperature": 0.1,
            "teacher_temperature": 0.04,
            "normalizer_order": 1,
        },
    }
    content = {
        "state_dict": state,
        "pytorch-lightning_version": "2.6.6",
        "dinovmf_plugin": {"cfg": cfg},
    }
    return nets, heads, content
