"""Which patches the student does not see: iBOT's masks and MSN's dropped patches, drawn on the device.

All of a batch is drawn at once, after loading, from an explicit generator: image folders and DALI behave
alike, and loader processes have no say in what a seed reproduces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "MASK_SHAPES",
    "MaskSampler",
    "MaskShape",
    "block_masks",
    "draw_ratios",
    "kept_patches",
    "random_masks",
]

MaskShape = Literal["block", "rand"]
MASK_SHAPES: tuple[str, ...] = get_args(MaskShape)

_ASPECT = (0.3, 1 / 0.3)
_TRIES = 10


def draw_ratios(
    num: int, means: Sequence[float], variances: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Share of the patches to mask, one per image.

    Each image takes one entry ``(mean, variance)`` of the lists, all equally likely, and draws
    ``U(mean - variance, mean + variance)`` from it.

    Returns:
        float32 ``(num,)`` on the generator's device.

    Example:
        >>> ratios = draw_ratios(1000, [0.0, 0.3], [0.0, 0.2], torch.Generator().manual_seed(0))
        >>> 0.45 < float((ratios == 0).float().mean()) < 0.55, float(ratios.max()) <= 0.5
        (True, True)
    """
    device = generator.device
    table = torch.tensor([list(means), list(variances)], device=device)
    entry = torch.randint(len(means), (num,), generator=generator, device=device)
    mean, variance = table[:, entry]
    return mean + variance * (2 * torch.rand(num, generator=generator, device=device) - 1)


def random_masks(ratios: Tensor, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Mask ``floor(ratio * rows * cols)`` patches of each image, all sets equally likely.

    Args:
        ratios: ``(N,)`` in [0, 1].
        rows: patches in a column of the grid.
        cols: patches in a row of the grid.
        generator: on the device of ``ratios``.

    Returns:
        bool ``(N, rows * cols)``, true where masked.

    Example:
        >>> masks = random_masks(torch.tensor([0.0, 0.5]), 4, 4, torch.Generator().manual_seed(0))
        >>> masks.sum(dim=1).tolist()
        [0, 8]
    """
    patches = rows * cols
    keys = torch.rand(len(ratios), patches, generator=generator, device=ratios.device)
    places = keys.argsort(dim=1).argsort(dim=1)
    return places < (ratios * patches).floor().unsqueeze(1)


def block_masks(ratios: Tensor, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Mask rectangles until ``ratio * rows * cols`` patches of each image are reached (BEiT, iBOT).

    A rectangle's area is uniform between ``(min(rows, cols) // 3) ** 2`` and what is missing, the
    logarithm of its aspect ratio between log 0.3 and -log 0.3, its place uniform. It counts if it is
    smaller than the grid in both directions and masks at least one new patch and not more than are
    missing. After ten rectangles in a row that do not count the image stays as it is, so the share ends
    at or below ``ratio``: on 14 x 14 patches 0.1 becomes 0.090, 0.3 0.292 and 0.5 0.498 on average.

    Every image of a batch tries its ten next rectangles at once and takes the first that counts: the
    same distribution as one try after the other, in as many rounds as the busiest image has rectangles.

    Args:
        ratios: ``(N,)`` in [0, 1].
        rows: patches in a column of the grid.
        cols: patches in a row of the grid.
        generator: on the device of ``ratios``.

    Returns:
        bool ``(N, rows * cols)``, true where masked.

    Example:
        >>> masks = block_masks(torch.tensor([0.0, 0.3]), 14, 14, torch.Generator().manual_seed(0))
        >>> masks[0].sum().item(), 40 < masks[1].sum().item() <= 58
        (0, True)
    """
    num, device = len(ratios), ratios.device
    images = torch.arange(num, device=device)
    grid_rows = torch.arange(rows, device=device).view(1, rows, 1)
    grid_cols = torch.arange(cols, device=device).view(1, 1, cols)
    smallest = float((min(rows, cols) // 3) ** 2)
    low, high = (math.log(aspect) for aspect in _ASPECT)

    masks = torch.zeros(num, rows, cols, dtype=torch.bool, device=device)
    missing = ratios * (rows * cols)
    active = missing > 0
    while bool(active.any()):
        u = torch.rand(4, num, _TRIES, generator=generator, device=device)
        area = smallest + u[0] * (missing.unsqueeze(1) - smallest)
        aspect = torch.exp(low + u[1] * (high - low))
        height = (area * aspect).sqrt().round().long()
        width = (area / aspect).sqrt().round().long()
        fits = (height < rows) & (width < cols)
        height, width = height * fits, width * fits
        top = (u[2] * (rows - height + 1)).long()
        left = (u[3] * (cols - width + 1)).long()

        # sums over rectangles from a table of sums over all top-left corners
        table = torch.zeros(num, rows + 1, cols + 1, dtype=torch.int32, device=device)
        table[:, 1:, 1:] = masks.int().cumsum(dim=1).cumsum(dim=2)
        i, bottom, right = images.unsqueeze(1), top + height, left + width
        inside = table[i, bottom, right] - table[i, top, right]
        inside = inside - table[i, bottom, left] + table[i, top, left]
        new = height * width - inside
        counts = (new > 0) & (new <= missing.unsqueeze(1)) & active.unsqueeze(1)

        active = counts.any(dim=1)
        first = counts.int().argmax(dim=1)
        top, bottom, left, right, new = (
            x[images, first].view(-1, 1, 1) for x in (top, bottom, left, right, new)
        )
        block = (grid_rows >= top) & (grid_rows < bottom)
        block = block & (grid_cols >= left) & (grid_cols < right)
        masks |= block & active.view(-1, 1, 1)
        missing = missing - new.flatten() * active
        active &= missing > 0
    return masks.flatten(1)


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of a batch (iBOT).

    Attributes:
        ratios: means of the share of masked patches; one entry is chosen per image.
        variances: half-widths around them, as many as ``ratios``.
        shape: ``block`` (rectangles) or ``rand`` (single patches).
        start_epoch: no patch is masked in earlier epochs.

    Raises:
        ValueError: for lists that do not fit, ratios outside [0, 1], or an unknown shape.

    Example:
        >>> sampler = MaskSampler([0.0, 0.3], [0.0, 0.2])
        >>> masks = sampler(6, 14, 14, torch.Generator().manual_seed(0))
        >>> masks.shape, masks.dtype
        (torch.Size([6, 196]), torch.bool)
        >>> MaskSampler([0.3], [0.4])
        Traceback (most recent call last):
        ...
        ValueError: pred_ratio 0.3 +- 0.4 leaves [0, 1]: every pred_ratio_var must be at most its ratio
    """

    ratios: Sequence[float]
    variances: Sequence[float]
    shape: str = "block"
    start_epoch: int = 0

    def __post_init__(self) -> None:
        if not self.ratios or len(self.ratios) != len(self.variances):
            raise ValueError(
                f"pred_ratio={list(self.ratios)} and pred_ratio_var={list(self.variances)} must be "
                "lists of one length: one variance for every ratio (iBOT: [0, 0.3] and [0, 0.2])"
            )
        for mean, variance in zip(self.ratios, self.variances, strict=True):
            if variance < 0 or mean - variance < 0 or mean + variance > 1:
                raise ValueError(
                    f"pred_ratio {mean} +- {variance} leaves [0, 1]: every pred_ratio_var must be at "
                    "most its ratio"
                )
        if self.shape not in MASK_SHAPES:
            raise ValueError(
                f"pred_shape={self.shape!r} is unknown: choose one of {', '.join(MASK_SHAPES)}"
            )

    def __call__(
        self, num: int, rows: int, cols: int, generator: torch.Generator, epoch: int = 0
    ) -> Tensor:
        """Masks ``(num, rows * cols)``, bool, on the generator's device; all false before the start."""
        if epoch < self.start_epoch:
            return torch.zeros(num, rows * cols, dtype=torch.bool, device=generator.device)
        ratios = draw_ratios(num, self.ratios, self.variances, generator)
        draw = block_masks if self.shape == "block" else random_masks
        return draw(ratios, rows, cols, generator)


def kept_patches(num_patches: int, drop: float, generator: torch.Generator) -> Tensor | None:
    """Indices of the ``floor((1 - drop) * num_patches)`` patches that stay, in order (MSN).

    One subset serves the whole batch. None, for all of them, if ``drop`` is 0.

    Raises:
        ValueError: if no patch would stay.

    Example:
        >>> len(kept_patches(196, 0.15, torch.Generator().manual_seed(0)))
        166
    """
    if not drop:
        return None
    kept = math.floor((1 - drop) * num_patches)
    if kept < 1:
        raise ValueError(f"patch_drop={drop} leaves none of {num_patches} patches: choose less")
    order = torch.randperm(num_patches, generator=generator, device=generator.device)
    return order[:kept].sort().values
