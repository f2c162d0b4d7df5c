"""Pictures and configs for the tests of the data room."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def smooth_picture(seed: int, height: int, width: int) -> Image.Image:
    """A colorful picture with soft shapes and some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_folder(
    root: Path, count: int, height: int = 72, width: int = 96, ending: str = "jpg"
) -> Path:
    """``count`` pictures in the class folders ``cat`` and ``dog/puppy``, every third upright."""
    for index in range(count):
        folder = root / ("cat" if index % 2 else "dog/puppy")
        folder.mkdir(parents=True, exist_ok=True)
        size = (width, height) if index % 3 == 2 else (height, width)
        smooth_picture(index, *size).save(folder / f"{index:03d}.{ending}", quality=95)
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 JPEG files in two classes, one of them nested."""
    return write_folder(tmp_path_factory.mktemp("pictures"), 22)


@pytest.fixture(scope="session")
def make_pipeline() -> Any:
    """Factory of one augmentation pipeline; DINO's jitter and flip unless switched off."""

    def make(
        size: int = 32,
        count: int = 1,
        scale: tuple[float, float] = (0.25, 1.0),
        blur: float = 0.0,
        solarize: float = 0.0,
        jitter: float = 0.8,
        gray: float = 0.2,
        flip: float = 0.5,
        equalize: float = 0.0,
    ) -> dict[str, Any]:
        return {
            "rrc": {"enabled": True, "crop_min_scale": scale[0], "crop_max_scale": scale[1]},
            "color_jitter": {
                "prob": jitter,
                "brightness": 0.4,
                "contrast": 0.4,
                "saturation": 0.2,
                "hue": 0.1,
            },
            "grayscale": {"prob": gray},
            "gaussian_blur": {"prob": blur},
            "solarization": {"prob": solarize},
            "equalization": {"prob": equalize},
            "horizontal_flip": {"prob": flip},
            "crop_size": size,
            "num_crops": count,
        }

    return make


@pytest.fixture(scope="session")
def multicrop(make_pipeline: Any) -> list[dict[str, Any]]:
    """DINO's recipe at a tenth of its size: two global crops, two local ones."""
    return [
        make_pipeline(32, blur=1.0),
        make_pipeline(32, blur=0.1, solarize=0.2),
        make_pipeline(16, 2, (0.05, 0.25), blur=0.5),
    ]


@pytest.fixture
def data_cfg(folder: Path, multicrop: list[dict[str, Any]]) -> Any:
    """Factory of configs; keyword arguments are dotted keys with ``__`` for the dot."""

    def make(**overrides: Any) -> dict[str, Any]:
        cfg: dict[str, Any] = {
            "seed": 3,
            "data": {
                "dataset": "custom",
                "format": "image_folder",
                "train_path": str(folder),
                "num_workers": 0,
            },
            "dali": {"device": "cpu", "encode_indexes_into_labels": False},
            "optimizer": {"batch_size": 4},
            "augmentations": multicrop,
        }
        for key, value in overrides.items():
            *parents, last = key.split("__")
            node = cfg
            for parent in parents:
                node = node[parent]
            node[last] = value
        return cfg

    return make


@pytest.fixture(scope="session")
def picture() -> Any:
    """Factory of colorful pictures ``(seed, height, width)``."""
    return smooth_picture


@pytest.fixture(scope="session")
def picture_folder() -> Any:
    """Factory of folders of pictures ``(root, count, height, width, ending)``."""
    return write_folder
