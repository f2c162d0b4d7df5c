"""A tiny retrieval set of three places and a tiny ViT."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from PIL import Image
from timm.models import VisionTransformer

from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
from dinovmf_plugin.runs.settings import read

SIDE = 32
PLACES = ("abbey", "bridge", "castle")


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0
    )
    torch.nn.init.normal_(model.cls_token)
    with torch.no_grad():  # at timm's initial scale the CLS token hardly sees the image
        for block in model.blocks:
            for weight in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight):
                weight.mul_(5)
    return model.eval()


def picture(rng, place, size):
    """A landmark: blocks of its own colors, with noise."""
    blocks = np.random.default_rng(place).integers(0, 256, (4, 4, 3))
    pixels = np.asarray(Image.fromarray(blocks.astype(np.uint8)).resize(size, 0), dtype=float)
    return Image.fromarray((pixels + rng.normal(0, 30, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_landmarks(folder):
    """4 images of each of 3 places, one query each; sizes differ."""
    rng = np.random.default_rng(0)
    (folder / "jpg").mkdir(parents=True)
    names, truths = [], []
    for place, name in enumerate(PLACES):
        for number in range(4):
            names.append(f"{name}_{number:06d}")
            size = [(32, 32), (48, 36), (30, 50), (64, 64)][number]
            picture(rng, place, size).save(folder / "jpg" / f"{names[-1]}.jpg", quality=95)
        picture(rng, place, (64, 48)).save(folder / "jpg" / f"{name}_query.jpg", quality=95)
        own = np.arange(4 * place, 4 * place + 4)
        truths.append(
            {"bbx": [8.2, 4.0, 40.0, 36.0], "easy": own[:2], "hard": own[2:3], "junk": own[3:]}
        )
    content = {"imlist": names, "qimlist": [f"{n}_query" for n in PLACES], "gnd": truths}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))


def settings(data, weights, out, **changes):
    given = {
        "checkpoint": weights if weights is None else str(weights),
        "data_path": str(data.parent),
        "output_dir": str(out),
    }
    given |= {"imsize": SIDE, "device": "cpu", "num_workers": 0, "show": 2}
    return read(RetrievalSettings, given | changes)


def change_truth(data, change):
    path = data / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
