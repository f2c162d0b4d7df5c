"""The look at the first batch: the sheet shows the pixels, the warning comes when crops are flat."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin.training.crops import CropCheck, EmptyCropsWarning, crop_contrast

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def normalized(pixels):
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def look(folder, local, *, step=0, write=True):
    """Warnings of a first batch with noise as global crops and ``local`` as local ones."""
    large = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    batch = [torch.arange(4), [normalized(x) for x in (*large, *local)], torch.zeros(4)]
    trainer = SimpleNamespace(global_step=step, is_global_zero=True)
    module = SimpleNamespace(run_folder=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CropCheck(MEAN, STD, 2, write=write).on_train_batch_start(trainer, module, batch, 0)
    return large, [str(w.message) for w in caught if w.category is EmptyCropsWarning]


def test_contrast__equals_numpy():
    crops = torch.rand(5, 3, 7, 9)
    expected = crops.double().numpy().reshape(5, 3, -1).std(-1, ddof=1).mean(1)
    np.testing.assert_allclose(crop_contrast(crops), expected, rtol=1e-5)


def test_sheet__shows_every_view_in_its_colors(tmp_path):
    flat = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(4, 3, 8, 8)
    large, _ = look(tmp_path, [torch.rand(4, 3, 8, 8), flat])
    sheet = np.asarray(Image.open(tmp_path / "crops.png")).astype(float) / 255
    assert sheet.shape == (4 * 68, 4 * 68, 3)
    # 64 pixels for a crop of 16: four for each of its own
    shown = sheet[2 + 68 : 66 + 68 : 4, 2:66:4]
    np.testing.assert_allclose(shown, large[0][1].permute(1, 2, 0), atol=1 / 255)
    np.testing.assert_allclose(sheet[10, 3 * 68 + 10], [0.2, 0.6, 0.9], atol=1 / 255)


@pytest.mark.parametrize(("flat_views", "warns"), [(0, False), (1, False), (2, True)])
def test_warning__if_most_local_crops_are_flat(tmp_path, flat_views, warns):
    nearly = 0.5 + 0.02 * torch.randn(4, 3, 8, 8)
    local = [nearly.clone() for _ in range(flat_views)]
    local += [torch.rand(4, 3, 8, 8) for _ in range(3 - flat_views)]
    _, found = look(tmp_path, local)
    assert bool(found) is warns
    if warns:
        assert "67% of the local crops" in found[0]
        assert "crop_min_scale" in found[0]


def test_resumed_run__is_not_looked_at_again(tmp_path):
    flat = torch.zeros(4, 3, 8, 8)
    assert look(tmp_path, [flat], step=5)[1] == []
    assert not (tmp_path / "crops.png").exists()
    assert look(tmp_path, [flat], write=False)[1]
    assert not (tmp_path / "crops.png").exists()
