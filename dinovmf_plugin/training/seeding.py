"""Randomness as a function of (seed, epoch, batch, rank): nothing to save, so resuming is exact."""

from __future__ import annotations

import random

import numpy as np
import torch
from omegaconf import DictConfig

__all__ = ["SeededSteps"]


class SeededSteps:
    """Mixin of the methods: every batch has its own seeds.

    What loaders and others have drawn from the global generators by some step differs between a resumed
    and an uninterrupted run; here no draw depends on it. Masks and dropped patches come from
    ``step_generator``, drop path from torch's global generator, seeded anew for every batch.
    """

    cfg: DictConfig
    current_epoch: int
    global_rank: int
    device: torch.device
    _batch_index = 0

    def derived_seed(self, *entropy: int) -> int:
        """A seed (32 bits) that is a function of the run's seed and of ``entropy``."""
        values = [int(self.cfg.get("seed", 0) or 0), *entropy]
        return int(np.random.SeedSequence(values).generate_state(1)[0])

    def step_generator(
        self, *, per_rank: bool = True, device: torch.device | None = None
    ) -> torch.Generator:
        """A generator for this batch, seeded by (seed, epoch, batch, rank).

        Args:
            per_rank: False if every rank is to draw the same.
            device: default the module's.
        """
        rank = self.global_rank if per_rank else 0
        # the last number keeps this stream apart from those of the epoch and of drop path
        seed = self.derived_seed(self.current_epoch, self._batch_index, rank, 1)
        return torch.Generator(device or self.device).manual_seed(seed)

    def seed_batch(self, batch_idx: int) -> None:
        """Begin batch ``batch_idx``: seed drop path by (seed, epoch, batch, rank)."""
        self._batch_index = batch_idx
        torch.manual_seed(self.derived_seed(self.current_epoch, batch_idx, self.global_rank, 2))

    def on_train_epoch_start(self) -> None:
        """Seed the generators that loaders draw from by (seed, epoch, rank)."""
        seed = self.derived_seed(self.current_epoch, self.global_rank)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (libraries draw from the global generator)
        torch.manual_seed(seed)
