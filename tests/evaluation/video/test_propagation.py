"""Label propagation against the full affinity matrix, patch by patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.evaluation.video import propagation as label_propagation
from dinovmf_plugin.evaluation.video.propagation import (
    labels_from_soft_map,
    one_hot_labels,
    propagate,
    propagate_labels,
)


def slow_propagate(target, context, labels, grid, radius, topk, temperature):
    """Every pair of patches by loops, in float64."""
    rows, cols = grid
    places = [(y, x) for y in range(rows) for x in range(cols)]
    out = np.zeros((labels.shape[1], rows * cols))
    for here, (y, x) in enumerate(places):
        affinity = []
        for frame in range(len(context)):
            for there, (v, u) in enumerate(places):
                seen = radius is None or (abs(y - v) <= radius and abs(x - u) <= radius)
                cosine = float(np.dot(target[here], context[frame, there]))
                affinity.append((np.exp(cosine / temperature) if seen else 0.0, frame, there))
        limit = sorted((value for value, _, _ in affinity), reverse=True)[:topk][-1]
        kept = [entry for entry in affinity if entry[0] >= limit]
        total = sum(value for value, _, _ in kept)
        for value, frame, there in kept:
            out[:, here] += value / total * labels[frame, :, there]
    return out


def problem(grid, frames, seed=0, classes=3, dim=6):
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    target = F.normalize(torch.randn(patches, dim, generator=generator, dtype=torch.float64), dim=1)
    context = torch.randn(frames, patches, dim, generator=generator, dtype=torch.float64)
    labels = torch.rand(frames, classes, patches, generator=generator, dtype=torch.float64)
    return target, F.normalize(context, dim=2), labels


@pytest.mark.parametrize("tile", [2, 5, 12])
@pytest.mark.parametrize(
    ("grid", "frames", "radius", "topk"),
    [
        ((5, 7), 3, 2, 5),
        ((5, 7), 3, None, 5),
        ((6, 4), 1, 1, 3),
        ((4, 9), 2, 12, 5),
        ((3, 3), 1, 0, 5),  # one patch in reach, five wanted
        ((1, 1), 2, 3, 50),  # more wanted than there are
    ],
)
def test_propagate_labels__equals_the_full_matrix(monkeypatch, grid, frames, radius, topk, tile):
    monkeypatch.setattr(label_propagation, "_TILE", tile)
    target, context, labels = problem(grid, frames)
    got = propagate_labels(target, context, labels, grid, radius=radius, topk=topk, temperature=0.1)
    expected = slow_propagate(
        target.numpy(), context.numpy(), labels.numpy(), grid, radius, topk, 0.1
    )
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_propagate_labels__ties_at_the_last_place_are_all_kept():
    """A flat video: every patch ties with every other, so labels become the window's mean."""
    grid, ones = (4, 6), torch.ones(24, 2, dtype=torch.float64) / 2**0.5
    _, _, labels = problem(grid, 1)
    got = propagate_labels(ones, ones[None], labels, grid, radius=1, topk=2)
    maps = labels[0].reshape(3, *grid)
    expected = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    torch.testing.assert_close(got.reshape(3, *grid), expected)


def test_propagate__context_is_the_first_frame_and_the_soft_maps_of_the_last_ones():
    grid, context_frames = (4, 5), 2
    torch.manual_seed(0)
    features = torch.randn(7, 20, 6, dtype=torch.float64) * 5
    labels = torch.rand(3, 20, dtype=torch.float64)
    given = {"radius": 2, "topk": 4, "temperature": 0.2}
    got = list(propagate(features, labels, grid, context_frames=context_frames, **given))
    assert len(got) == 6
    unit = F.normalize(features, dim=2).numpy()
    known = [labels.numpy()]
    for frame in range(1, 7):
        used = [0, *range(max(1, frame - context_frames), frame)]
        soft = slow_propagate(
            unit[frame], unit[used], np.stack([known[i] for i in used]), grid, *given.values()
        )
        known.append(soft)
        np.testing.assert_allclose(got[frame - 1].numpy(), soft, atol=1e-12)


def test_propagate__without_memory_only_the_first_frame_counts():
    features, labels = torch.randn(4, 6, 3), torch.rand(2, 6)
    got = list(propagate(features, labels, (2, 3), context_frames=0))
    unit = F.normalize(features, dim=2)
    for frame in range(3):
        expected = propagate_labels(unit[frame + 1], unit[:1], labels[None], (2, 3))
        torch.testing.assert_close(got[frame], expected)


def test_propagate__reads_frames_one_at_a_time():
    read = []

    def frames():
        for index in range(5):
            read.append(index)
            yield torch.randn(4, 3)

    results = propagate(frames(), torch.rand(2, 4), (2, 2))
    next(results)
    assert read == [0, 1]


def test_labels_from_soft_map__stretched_bilinear_argmax():
    torch.manual_seed(1)
    soft, grid, patch = torch.rand(3, 12) * torch.tensor([[1.0], [0.05], [0.3]]), (3, 4), (4, 2)
    maps = F.interpolate(
        soft.reshape(1, 3, 3, 4), scale_factor=(4.0, 2.0), mode="bilinear", align_corners=False
    )[0].numpy()
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    expected = ((maps - low) / (high - low)).argmax(axis=0)
    got = labels_from_soft_map(soft, grid, patch).numpy()
    assert got.shape == (12, 8)
    assert (got == expected).all()
    assert set(got.ravel().tolist()) == {0, 1, 2}  # stretching lets the weak map win somewhere


def test_labels_from_soft_map__constant_maps_lose():
    soft = torch.stack([torch.linspace(0, 1, 4), torch.zeros(4), torch.full((4,), 0.7)])
    assert (labels_from_soft_map(soft, (2, 2), (2, 2)) == 0).all()


def test_one_hot_labels__round_trip():
    mask = torch.tensor([[0, 2, 1], [3, 3, 0]])
    hot = one_hot_labels(mask, 5)
    assert hot.shape == (5, 6)
    assert hot[4].sum() == 0
    assert (hot.argmax(dim=0).reshape(2, 3) == mask).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 2)}, r"a grid of 2 x 2 patches needs features \(4, D\)"),
        ({"labels": torch.rand(2, 3, 5)}, r"labels must be \(2, 3, 6\)"),
        ({"topk": 0}, "topk=0 must be at least 1"),
        ({"temperature": 0}, "temperature=0 above 0"),
        ({"radius": -1}, "radius=-1 at least 0"),
    ],
)
def test_bad_input__one_sentence(change, message):
    target, context, labels = problem((2, 3), 2)
    given = {"target": target, "context": context, "labels": labels, "grid": (2, 3)} | change
    with pytest.raises(ValueError, match=message):
        propagate_labels(**given)
    with pytest.raises(ValueError, match="context_frames=-1 must be at least 0"):
        next(propagate([target], labels[0], (2, 3), context_frames=-1))
