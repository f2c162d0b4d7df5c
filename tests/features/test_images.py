"""What a listing of images is bound to."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from dinovmf_plugin.features.images import image_folder


@pytest.fixture
def folder(tmp_path):
    for name in ("a/0.bmp", "b/0.bmp"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    return tmp_path / "set"


def test_digest__changes_with_pixels_of_the_same_size(folder):
    first = image_folder(str(folder), "data.train_path").digest
    assert image_folder(str(folder), "data.train_path").digest == first
    path = folder / "a" / "0.bmp"
    size = path.stat().st_size
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(path)
    assert path.stat().st_size == size
    second = image_folder(str(folder), "data.train_path").digest
    assert second != first
    os.utime(path, ns=(0, 0))
    assert image_folder(str(folder), "data.train_path").digest not in (first, second)
