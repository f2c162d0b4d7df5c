"""Masks: shares, shapes, and the same distribution as one try after the other."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats
import torch

from dinovmf_plugin.core.masking import (
    MaskSampler,
    block_masks,
    draw_ratios,
    kept_patches,
    random_masks,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sequential_block_mask(ratio: float, rows: int, cols: int, rng: random.Random) -> np.ndarray:
    """BEiT's procedure in words: one rectangle after the other, one try after the other."""
    mask = np.zeros((rows, cols), dtype=bool)
    goal = ratio * rows * cols
    failures = 0
    while mask.sum() < goal and failures < 10:
        missing = goal - mask.sum()
        area = rng.uniform((min(rows, cols) // 3) ** 2, missing)
        aspect = 0.3 ** rng.uniform(-1, 1)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if h >= rows or w >= cols:
            continue
        top, left = rng.randint(0, rows - h), rng.randint(0, cols - w)
        grown = mask.copy()
        grown[top : top + h, left : left + w] = True
        if 0 < grown.sum() - mask.sum() <= missing:
            mask, failures = grown, 0
    return mask


# ---- block-wise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "realised"), [(0.1, 0.090), (0.2, 0.195), (0.3, 0.292), (0.4, 0.395), (0.5, 0.498)]
)
def test_block_masks__14_by_14__end_slightly_below_the_ratio(ratio, realised):
    masks = block_masks(torch.full((1000,), ratio), 14, 14, _generator())
    share = masks.float().mean(dim=1)
    assert share.mean().item() == pytest.approx(realised, abs=0.001)
    assert share.max() <= ratio + 1e-6
    assert share.min() > 0


@pytest.mark.parametrize(("rows", "cols", "ratio"), [(14, 14, 0.3), (7, 10, 0.5)])
def test_block_masks__distribution_of_sequential_tries(rows, cols, ratio):
    rng = random.Random(0)
    slow = np.stack([_sequential_block_mask(ratio, rows, cols, rng) for _ in range(700)])
    fast = block_masks(torch.full((4000,), ratio), rows, cols, _generator()).numpy()
    fast = fast.reshape(-1, rows, cols)
    counts = [masks.sum(axis=(1, 2)) for masks in (slow, fast)]
    assert scipy.stats.ks_2samp(*counts).pvalue > 1e-3
    # edges between masked and seen cells tell rectangles from scattered cells and long from square ones
    for axis in (1, 2):
        edges = [np.diff(masks.astype(int), axis=axis).any(axis=(1, 2)) for masks in (slow, fast)]
        number = [np.abs(np.diff(m.astype(int), axis=axis)).sum(axis=(1, 2)) for m in (slow, fast)]
        assert all(e.mean() > 0.99 for e in edges)
        assert scipy.stats.ks_2samp(*number).pvalue > 1e-3
    # each cell is masked as often: about 4 standard errors of the slow estimate
    spread = np.sqrt(slow.mean(0) * (1 - slow.mean(0)) / len(slow))
    assert (np.abs(slow.mean(0) - fast.mean(0)) < 4.2 * spread + 0.01).all()


def test_block_masks__small_share__is_one_filled_rectangle():
    """17 cells are one rectangle of 16 or 17 cells, or a smaller one with a few single cells."""
    masks = block_masks(torch.full((200,), 17 / 196), 14, 14, _generator()).view(-1, 14, 14)
    table = torch.zeros(200, 15, 15, dtype=torch.int64)
    table[:, 1:, 1:] = masks.long().cumsum(1).cumsum(2)
    largest = torch.zeros(200, dtype=torch.int64)
    for h in range(1, 14):
        for w in range(1, 14):
            if not 0.3 / 1.5 <= h / w <= 1.5 / 0.3:  # rounding widens the range of aspect ratios
                continue
            inside = table[:, h:, w:] - table[:, :-h, w:] - table[:, h:, :-w] + table[:, :-h, :-w]
            filled = (inside == h * w).flatten(1).any(dim=1)
            largest[filled & (largest < h * w)] = h * w
    assert (largest >= 12).all()
    assert (masks.sum(dim=(1, 2)) - largest <= 5).all()


def test_block_masks__mixed_batch__images_do_not_touch_each_other():
    ratios = torch.tensor([0.0, 0.5, 0.0, 0.1])
    counts = block_masks(ratios, 14, 14, _generator()).sum(dim=1)
    assert counts[0] == counts[2] == 0
    assert 90 < counts[1] <= 98
    assert 0 < counts[3] <= 19


def test_block_masks__tiny_grids__end():
    assert not block_masks(torch.ones(4), 1, 1, _generator()).any()
    assert block_masks(torch.ones(4), 2, 2, _generator()).any()


# ---- random cells --------------------------------------------------------------------------------


def test_random_masks__exactly_the_floor_and_uniform():
    ratios = torch.tensor([0.0, 0.3, 0.75, 1.0]).repeat(500)
    masks = random_masks(ratios, 4, 4, _generator())
    assert masks.sum(dim=1).tolist() == [0, 4, 12, 16] * 500
    marginal = masks[1::4].float().mean(dim=0)
    assert (marginal - 0.25).abs().max() < 0.08


# ---- ratios --------------------------------------------------------------------------------------


def test_draw_ratios__one_entry_per_image_then_uniform():
    ratios = draw_ratios(4000, [0.0, 0.3], [0.0, 0.2], _generator()).numpy()
    masked = ratios[ratios != 0]
    assert len(masked) == pytest.approx(2000, abs=130)
    assert scipy.stats.kstest(masked, "uniform", args=(0.1, 0.4)).pvalue > 1e-3
    assert draw_ratios(3, [0.25], [0.0], _generator()).tolist() == [0.25] * 3


def test_sampler__published_mix__masks_15_percent():
    masks = MaskSampler([0.0, 0.3], [0.0, 0.2])(4000, 14, 14, _generator())
    assert masks.float().mean().item() == pytest.approx(0.1475, abs=0.006)
    unmasked = (~masks.any(dim=1)).float().mean().item()
    assert unmasked == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_sampler__is_a_function_of_the_seed(shape):
    sampler = MaskSampler([0.3], [0.2], shape)
    first, again = (sampler(16, 14, 14, _generator(3)) for _ in range(2))
    other = sampler(16, 14, 14, _generator(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampler__before_start_epoch__masks_nothing():
    sampler = MaskSampler([0.3], [0.0], start_epoch=2)
    assert [bool(sampler(2, 14, 14, _generator(), epoch).any()) for epoch in range(4)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratios": [0.3], "variances": [0.1, 0.2]}, "one variance for every ratio"),
        ({"ratios": [], "variances": []}, "one variance for every ratio"),
        ({"ratios": [0.9], "variances": [0.2]}, r"0.9 \+- 0.2 leaves \[0, 1\]"),
        ({"ratios": [0.3], "variances": [-0.1]}, "leaves"),
        ({"ratios": [0.3], "variances": [0.1], "shape": "stripes"}, "pred_shape='stripes'"),
    ],
)
def test_sampler__impossible_settings__are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(**kwargs)


# ---- dropped patches -----------------------------------------------------------------------------


def test_kept_patches__floor_of_the_rest_without_repetition():
    kept = kept_patches(196, 0.15, _generator())
    assert len(kept) == math.floor(0.85 * 196) == len(set(kept.tolist()))
    assert kept.min() >= 0
    assert kept.max() < 196
    assert torch.equal(kept, kept_patches(196, 0.15, _generator()))
    assert not torch.equal(kept, kept_patches(196, 0.15, _generator(1)))
    assert kept_patches(196, 0.0, _generator()) is None


def test_kept_patches__nothing_left__is_an_error():
    with pytest.raises(ValueError, match=r"patch_drop=0.9 leaves none of 4 patches"):
        kept_patches(4, 0.9, _generator())
