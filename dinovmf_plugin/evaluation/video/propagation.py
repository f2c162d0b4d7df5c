"""Labels carried through a video by the similarity of patch features.

Every patch of a new frame looks at the patches of its context (the first frame and the few before
it) that lie near its own place, keeps the most similar ones and takes the softmax-weighted mean of
their labels. Nothing is trained.

References:
    - Jabri et al., Space-Time Correspondence as a Contrastive Random Walk, NeurIPS 2020, appendix.
    - The evaluation of DINO (Caron et al., 2021), whose numbers are the defaults here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["labels_from_soft_map", "one_hot_labels", "propagate", "propagate_labels"]

#: Side, in patches, of the block of targets that is worked on at once.
_TILE = 12


def _check(target: Tensor, context: Tensor, labels: Tensor, grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    expected = (len(context), labels.shape[1], patches)
    if target.shape != (patches, context.shape[-1]) or tuple(context.shape[:2]) != (
        len(labels),
        patches,
    ):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} patches needs features ({patches}, D) and context "
            f"(frames, {patches}, D), got {tuple(target.shape)} and {tuple(context.shape)}"
        )
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")


def _span(start: int, stop: int, reach: int | None, size: int) -> slice:
    """Rows (or columns) that the targets ``start .. stop`` can see."""
    if reach is None:
        return slice(0, size)
    return slice(max(0, start - reach), min(size, stop + reach))


def _too_far(targets: slice, sources: slice, reach: int | None, like: Tensor) -> Tensor:
    """``(targets, sources)``: -inf for pairs further apart than ``reach`` along one axis, else 0."""
    here = torch.arange(targets.start, targets.stop, device=like.device)
    there = torch.arange(sources.start, sources.stop, device=like.device)
    far = like.new_zeros(len(here), len(there))
    if reach is None:
        return far
    return far.masked_fill_((here[:, None] - there[None]).abs() > reach, -torch.inf)


def propagate_labels(
    target: Tensor,
    context: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    *,
    radius: int | None = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Soft labels of one frame from the labels of its context.

    The weight of a context patch is ``exp(cos / temperature)`` if it is among the ``topk`` most
    similar of *all* context frames together (all that tie with the last are kept) and its row and
    column are each at most ``radius`` away; weights are normalized per target patch.

    Affinities are formed for a block of target patches and the window around it, so memory grows
    with the block and the window, not with the square of the number of patches.

    Args:
        target: unit features ``(rows * cols, D)``, row by row.
        context: unit features ``(frames, rows * cols, D)``.
        labels: soft labels ``(frames, K, rows * cols)``.
        grid: ``(rows, cols)``.
        radius: window in patches; None lets every patch see every other.
        topk: context patches kept per target patch.
        temperature: of the softmax.

    Returns:
        Soft labels ``(K, rows * cols)`` in the dtype of ``labels``.

    Raises:
        ValueError: if shapes do not fit, or a setting is out of range.

    Example:
        >>> target = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=1)
        >>> context = target.flip(0)[None]  # the two patches changed places
        >>> labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> propagate_labels(target, context, labels, (1, 2), topk=1)
        tensor([[0., 1.],
                [1., 0.]])
    """
    _check(target, context, labels, grid)
    if topk < 1 or temperature <= 0 or (radius is not None and radius < 0):
        raise ValueError(
            f"topk={topk} must be at least 1, temperature={temperature} above 0 and "
            f"radius={radius} at least 0 or None"
        )
    rows, cols = grid
    frames, classes = labels.shape[:2]
    target_map = target.reshape(rows, cols, -1)
    context_map = context.reshape(frames, rows, cols, -1)
    label_map = labels.reshape(frames, classes, rows, cols)
    out = labels.new_empty(classes, rows, cols)
    for top in range(0, rows, _TILE):
        down = slice(top, min(top + _TILE, rows))
        near_rows = _span(down.start, down.stop, radius, rows)
        for left in range(0, cols, _TILE):
            across = slice(left, min(left + _TILE, cols))
            near_cols = _span(across.start, across.stop, radius, cols)
            features = target_map[down, across].flatten(0, 1)
            sources = context_map[:, near_rows, near_cols].flatten(0, 2)
            window = (
                _too_far(down, near_rows, radius, features)[:, None, :, None]
                + _too_far(across, near_cols, radius, features)[None, :, None, :]
            ).reshape(len(features), 1, -1)
            hidden = window.expand(-1, frames, -1).flatten(1)
            similarity = torch.addmm(hidden, features, sources.T)
            best = similarity.topk(min(topk, similarity.shape[1]), dim=1).values
            # -inf is a tie of its own where fewer than topk patches are in reach; its weight is 0
            similarity.masked_fill_(similarity < best[:, -1:], -torch.inf)
            weights = (similarity / temperature).softmax(dim=1).to(labels.dtype)
            known = label_map[:, :, near_rows, near_cols].transpose(0, 1).flatten(1)
            out[:, down, across] = (known @ weights.T).reshape(out[:, down, across].shape)
    return out.flatten(1)


def propagate(
    features: Iterable[Tensor],
    first_labels: Tensor,
    grid: tuple[int, int],
    *,
    context_frames: int = 7,
    radius: int | None = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Iterator[Tensor]:
    """Carry the first frame's labels through a video, frame by frame.

    The context of a frame is the first frame and up to ``context_frames`` frames before it, with
    their *soft* labels (no argmax in between). Features are consumed lazily, so only the context is
    ever in memory.

    Args:
        features: one ``(rows * cols, D)`` tensor per frame, first frame first; normalized here.
        first_labels: ``(K, rows * cols)``, one-hot.
        grid: ``(rows, cols)``.
        context_frames: frames remembered besides the first.
        radius: see ``propagate_labels``, as for ``topk`` and ``temperature``.
        topk: context patches kept per target patch.
        temperature: of the softmax.

    Yields:
        ``(K, rows * cols)`` for the second frame, the third, and so on.

    Raises:
        ValueError: as ``propagate_labels``, or if ``context_frames`` is negative.
    """
    if context_frames < 0:
        raise ValueError(f"context_frames={context_frames} must be at least 0")
    frames = (F.normalize(frame, dim=-1) for frame in features)
    first = next(frames)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=context_frames)
    for target in frames:
        context = torch.stack([first, *(feature for feature, _ in recent)])
        labels = torch.stack([first_labels, *(label for _, label in recent)])
        soft = propagate_labels(
            target, context, labels, grid, radius=radius, topk=topk, temperature=temperature
        )
        recent.append((target, soft))
        yield soft


def one_hot_labels(mask: Tensor, classes: int) -> Tensor:
    """Label numbers ``(rows, cols)`` to float32 ``(classes, rows * cols)``.

    Example:
        >>> one_hot_labels(torch.tensor([[0, 1]]), 2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return F.one_hot(mask.flatten().long(), classes).T.float()


def labels_from_soft_map(
    soft: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]
) -> Tensor:
    """Label numbers per pixel from soft labels per patch.

    Bilinear by the patch size; then each label's map is stretched to [0, 1] over the frame, so that
    a small object's weak map can win; then argmax (the lowest number on a tie).

    Args:
        soft: ``(K, rows * cols)``.
        grid: ``(rows, cols)``.
        patch_size: pixels ``(height, width)``.

    Returns:
        int64 ``(rows * height, cols * width)``.

    Differs from upstream: a map that is constant but not zero becomes 0, where the official script
    divides by zero and lets nan win.
    """
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    maps = soft.reshape(1, -1, *grid)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return stretched.argmax(dim=0)
