"""Attention maps from hand-made attention, and their pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin.analysis.attention import (
    attention_sheet,
    cls_attention,
    overlay,
    save_attention,
)


def test_cls_attention__takes_the_patches_behind_registers():
    attention = torch.zeros(1, 2, 9, 9)  # CLS, two registers, 2 x 3 patches
    attention[0, 1, 0] = torch.arange(9.0)
    maps = cls_attention(attention, (2, 3))
    assert maps[0, 1].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert maps[0, 0].sum() == 0
    with pytest.raises(ValueError, match="3 x 3"):
        cls_attention(attention, (3, 3))


def test_overlay__is_brightest_where_attention_is():
    image = np.full((32, 48, 3), 90, dtype=np.uint8)
    weight = torch.zeros(2, 3)
    weight[1, 2] = 1
    shown = np.asarray(overlay(image, weight), dtype=float).sum(-1)
    assert shown.shape == (32, 48)
    assert np.unravel_index(shown.argmax(), shown.shape) > (16, 32)
    flat = np.asarray(overlay(image, torch.ones(2, 3)))
    assert (flat == flat[0, 0]).all()


def test_sheets__have_one_tile_per_head_and_are_written(tmp_path):
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    maps = torch.rand(2, 3, 2, 4)
    assert attention_sheet(image, maps[0], side=20, gap=4).size == (5 * 44 - 4, 20)
    assert attention_sheet(image, maps[0], side=60, gap=0).size == (5 * 120, 60)
    paths = save_attention([image, image], maps, ["a", "b"], tmp_path / "out")
    assert [Image.open(path).size[1] for path in paths] == [224, 224]
    with pytest.raises(ValueError, match="different names"):
        save_attention([image, image], maps, ["a", "a"], tmp_path)
