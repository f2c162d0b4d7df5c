"""Small labeled image folders and tiny Vision Transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("bar", "blue", "green", "red")


def _image(label: int, rng: np.random.Generator, size: int) -> Image.Image:
    """A colored square (or a white bar) somewhere on noise."""
    pixels = rng.integers(0, 90, (size, size, 3))
    row, column = rng.integers(0, size // 2, 2)
    if label == 0:
        pixels[row : row + 4, column : column + size // 2] += 110
    else:
        pixels[row : row + size // 3, column : column + size // 3, 3 - label] += 130
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Factory of image folders: ``make_folder(per_class=8, seed=0)`` -> path of ``root/CLASS/i.png``."""

    def make(per_class=8, seed=0, classes=CLASSES, size=24) -> Path:
        root = tmp_path_factory.mktemp("images")
        rng = np.random.default_rng(seed)
        for name in classes:
            (root / name).mkdir()
            for i in range(per_class):
                _image(CLASSES.index(name), rng, size).save(root / name / f"{i}.png")
        return root

    return make


@pytest.fixture(scope="session")
def folders(make_folder):
    """``(train, val)`` with 12 and 5 images per class."""
    return make_folder(12, seed=0), make_folder(5, seed=1)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    """Weights of an untrained ViT with 2 blocks of width 192 and patches of 8 pixels, for 24 pixels."""
    from timm.models import VisionTransformer

    torch.manual_seed(11)
    vit = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0
    )
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(vit.state_dict(), path)
    return path


@pytest.fixture
def compose():
    """Factory of resolved configs: ``compose("knn", "knn.ks=[1]")``."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    def make(name, *overrides):
        with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
            return hydra_compose(name, overrides=[str(override) for override in overrides])

    return make


@pytest.fixture
def run_overrides(folders, vit_file, tmp_path):
    """Overrides that make any evaluation of 24-pixel images run in this process."""
    train, val = folders
    return [
        f"checkpoint={vit_file}",
        f"output_dir={tmp_path / 'out'}",
        f"data.train_path={train}",
        f"data.val_path={val}",
        "data.num_workers=0",
        "data.check_images=none",
        "device=cpu",
        "progress=false",
    ]
