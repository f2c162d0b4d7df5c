"""Palettes, frames, annotations, overlays and animations of video segmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin.data.channels import Statistics
from dinovmf_plugin.evaluation.video import davis
from dinovmf_plugin.evaluation.video.figures import overlay
from tests.evaluation.video.synthetic_video import moving_objects, write_moving_objects


def test_palette__is_pillows_reading_of_the_voc_formula(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    davis.write_annotation(tmp_path / "all.png", labels)
    assert (davis.read_annotation(tmp_path / "all.png") == labels).all()
    with Image.open(tmp_path / "all.png") as image:
        colors = np.asarray(image.convert("RGB")).reshape(256, 3)
    assert len(np.unique(colors, axis=0)) == 256
    for label in range(256):
        bits = [label >> place & 1 for place in range(8)]
        for channel in range(3):
            own = bits[channel::3]  # lowest first; the lowest is the strongest
            assert colors[label, channel] == sum(bit << (7 - i) for i, bit in enumerate(own))


def test_frame__size_and_normalization(tmp_path):
    assert davis.frame_size(480, 854, 480, (8, 8)) == (480, 832)
    assert davis.frame_size(854, 480, 480, (16, 16)) == (832, 480)
    assert davis.frame_size(480, 480, 480, (16, 16)) == (480, 448)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    frame = davis.read_frame(tmp_path / "frame.png", (64, 128))
    levels = frame * torch.tensor([0.228, 0.224, 0.225])[:, None, None]
    levels = (levels + torch.tensor([0.485, 0.456, 0.406])[:, None, None]).permute(1, 2, 0) * 255
    # bilinear without antialiasing by hand: pixel centers, two neighbors, rounded
    where = (np.arange(128) + 0.5) * 130 / 128 - 0.5
    left = np.floor(where).astype(int).clip(0, 128)
    share = (where - left)[None, :, None]
    expected = (pixels[:, left] * (1 - share) + pixels[:, left + 1] * share).round()
    np.testing.assert_allclose(
        levels.numpy(), expected, atol=1.01e-0
    )  # halves may round either way
    assert np.mean(np.abs(levels.numpy() - expected) > 0.01) < 0.01
    assert levels.numpy() == pytest.approx(levels.numpy().round(), abs=1e-3)
    plain = davis.read_frame(
        tmp_path / "frame.png", (64, 128), Statistics((0.0,) * 3, (1 / 255,) * 3)
    )
    torch.testing.assert_close(plain.permute(1, 2, 0), levels, atol=1e-3, rtol=0)


def test_shrink_annotation__nearest_and_void_is_background():
    labels = np.zeros((8, 8), np.uint8)
    labels[:4, :4], labels[4:, 4:] = 3, 255
    assert davis.shrink_annotation(labels, (2, 2)).tolist() == [[3, 0], [0, 0]]


def test_overlay__tints_objects_only():
    frame = Image.new("RGB", (6, 4), (100, 100, 100))
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:] = 1
    labels[0, 0] = 255
    tinted = np.asarray(overlay(frame, labels))
    assert (tinted[:, :2] == 100).all()
    assert (tinted[:, 2] == 255).all()  # outline
    assert (tinted[:, 3:] == [114, 50, 50]).all()


def test_moving_objects__seeded_and_moving(tmp_path):
    frames, masks = moving_objects(frames=5, size=(64, 100), objects=3, seed=2)
    again, _ = moving_objects(frames=5, size=(64, 100), objects=3, seed=2)
    assert all((a == b).all() for a, b in zip(frames, again, strict=True))
    assert {1, 2, 3} <= set(np.unique(masks[0]).tolist())
    assert (masks[0] != masks[4]).any()
    with pytest.raises(ValueError, match="objects=9 1 to 8"):
        moving_objects(objects=9)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_moving_objects(tmp_path)
