"""What the network is about to see: a sheet of the first crops, and a warning where they show nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

__all__ = ["SHEET", "CropCheck", "EmptyCropsWarning", "crop_contrast", "crop_sheet"]

SHEET = "crops.png"
LEAST_CONTRAST = 0.04
_IMAGES = 8
_WIDTH = 64  # of a cell of the sheet


class EmptyCropsWarning(UserWarning):
    """Most local crops are nearly constant."""


def crop_contrast(crops: Tensor) -> Tensor:
    """Standard deviation over the pixels of each crop, mean of the channels: 0 is one flat color.

    Args:
        crops: pixel values in [0, 1], ``(n, C, H, W)``.

    Returns:
        ``(n,)``.

    Example:
        >>> crop_contrast(torch.stack([torch.ones(3, 4, 4), torch.eye(4).expand(3, 4, 4)])).round(decimals=2)
        tensor([0.0000, 0.4500])
    """
    return crops.flatten(2).std(dim=-1).mean(dim=-1)


def crop_sheet(crops: Sequence[Tensor], images: int = _IMAGES, width: int = _WIDTH) -> Image.Image:
    """One row an image, one column a view; smaller crops keep their relative size.

    Args:
        crops: views of pixel values in [0, 1], each ``(B, 3, H, W)``.
        images: rows at most.
        width: of the largest view, in pixels.
    """
    rows, largest = min(images, len(crops[0])), max(view.shape[-1] for view in crops)
    sheet = Image.new("RGB", (len(crops) * (width + 4), rows * (width + 4)), "#80858c")
    for column, view in enumerate(crops):
        side = max(1, round(width * view.shape[-1] / largest))
        for row in range(rows):
            pixels = (view[row].float().clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (width + 4) + 2, row * (width + 4) + 2))
    return sheet


class CropCheck(Callback):
    """Looks at the first batch before the first step: ``crops.png``, and a warning if it shows little.

    Changes nothing of the training and draws no random numbers. A resumed run has been looked at.

    Args:
        mean: channel means that the pixels were normalized by.
        std: channel deviations.
        large: number of global crops, which come first.
        write: whether to write ``crops.png`` into the run's folder (``pl_module.run_folder``).
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], large: int, *, write: bool = True
    ) -> None:
        super().__init__()
        self.mean, self.std, self.large, self.write = tuple(mean), tuple(std), large, write

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch if it is the first one."""
        if trainer.global_step or batch_idx or not trainer.is_global_zero:
            return
        crops = self._pixels(batch)
        if crops is None:
            return
        if self.write:
            crop_sheet(crops).save(Path(getattr(pl_module, "run_folder", ".")) / SHEET)
        small = crops[self.large :] or crops
        contrast = torch.cat([crop_contrast(view) for view in small])
        empty = float((contrast < LEAST_CONTRAST).float().mean())
        if empty > 0.5:
            kind = "local crops" if len(crops) > self.large else "crops"
            where = f" (see {SHEET} in the run's folder)" if self.write else ""
            warnings.warn(
                f"{empty:.0%} of the {kind} of the first batch are nearly one flat color{where}: they say "
                "nothing about their image, and the network learns to say nothing. Make them larger "
                "(rrc.crop_min_scale and crop_max_scale of the augmentations), or use images with more "
                "texture",
                EmptyCropsWarning,
                stacklevel=2,
            )

    def _pixels(self, batch: Any) -> list[Tensor] | None:
        """Views of a batch ``(indices, views, labels)`` in [0, 1]; None for anything else."""
        views = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
        if isinstance(views, Tensor):
            views = [views]
        if not views or not all(isinstance(v, Tensor) and v.ndim == 4 for v in views):
            return None
        mean, std = (
            torch.tensor(values, device=views[0].device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return [view.float() * std + mean for view in views]
