"""Which image is in which batch, and the random numbers of each image.

Both are pure functions of (seed, epoch, index). Nothing here depends on the number of workers, on
the backend or on what was read before, so a run that is resumed, at the start or in the middle of
an epoch, sees exactly the batches and crops of the uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Disjoint streams of one seed: the second word of the generator's key.
_ORDER, _SAMPLE = 0, 1


def _generator(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got seed {seed} and epoch {epoch}")
    # Philox is counter-based: any (epoch, index) is reached at once, and the streams cannot
    # overlap.
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, epoch, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_uniforms(seed: int, epoch: int, index: int, size: int) -> npt.NDArray[np.float64]:
    """The random numbers of one image in one epoch.

    Args:
        seed: the run's seed, not negative.
        epoch: epoch, from 0.
        index: the image's index in the data set.
        size: how many numbers to draw; a longer draw starts with the shorter one.

    Returns:
        ``(size,)`` float64, uniform in [0, 1).

    Example:
        >>> bool((sample_uniforms(5, 0, 7, 3) == sample_uniforms(5, 0, 7, 4)[:3]).all())
        True
        >>> bool((sample_uniforms(5, 0, 7, 3) == sample_uniforms(5, 1, 7, 3)).any())
        False
    """
    return _generator(seed, _SAMPLE, epoch, index).random(size)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of every epoch, on every rank.

    Each epoch is one permutation of the whole data set, cut into global batches of ``batch_size *
    world_size``; a rank takes its slice of each. So every image is used at most once per epoch, all
    ranks make the same number of steps, the incomplete global batch at the end is dropped (other
    images in each epoch), and the global batches do not depend on the number of ranks.

    Attributes:
        num_samples: number of images.
        batch_size: images per step on one rank.
        seed: the run's seed (the same on all ranks).
        rank: this process, from 0.
        world_size: number of processes.

    Example:
        >>> plan = EpochPlan(num_samples=10, batch_size=2, seed=0, rank=1, world_size=2)
        >>> plan.steps, plan.indices(epoch=0).shape
        (2, (2, 2))
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"optimizer.batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}")
        if self.num_samples < self.batch_size * self.world_size:
            ranks = f" x {self.world_size} processes" if self.world_size > 1 else ""
            raise ValueError(
                f"there are fewer images ({self.num_samples}) than one batch (optimizer.batch_size = "
                f"{self.batch_size}{ranks}): lower optimizer.batch_size or add images"
            )

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on all ranks."""
        return self.num_samples // (self.batch_size * self.world_size)

    def indices(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices of the images of this rank, ``(steps, batch_size)`` int64."""
        order = _generator(self.seed, _ORDER, epoch, 0).permutation(self.num_samples)
        used = order[: self.steps * self.batch_size * self.world_size]
        return used.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank]


class ResumableLoader:
    """Base of the training loaders: counts epochs and steps, and starts anywhere.

    A loader iterates over one epoch; after its last batch the next iteration is the next epoch,
    after an epoch that was left early it is the same one again. Lightning calls
    ``loader.sampler.set_epoch`` before each epoch and stores ``state_dict`` in its checkpoints, so
    both kinds of resuming need no further wiring. Subclasses implement ``_batches``.
    """

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self._step = 0
        self._start = 0

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.plan.steps

    @property
    def sampler(self) -> ResumableLoader:
        """The object whose ``set_epoch`` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that epoch; a position restored for the same epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._start, self._step = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what it is only valid for."""
        return {"epoch": self.epoch, "step": self._step, "plan": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of the middle of an epoch with another data set, batch size, seed
                or number of processes.
        """
        if int(state["step"]) and state["plan"] != self._identity():
            raise ValueError(
                f"cannot continue in the middle of the epoch: the checkpoint's loader had {state['plan']}, "
                f"this one has {self._identity()}"
            )
        self.epoch, self._step = int(state["epoch"]), int(state["step"])
        self._start = self._step

    def close(self) -> None:
        """End processes that belong to the loader, if there are any."""

    def _identity(self) -> dict[str, int]:
        plan = self.plan
        return {
            "num_samples": plan.num_samples,
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "world_size": plan.world_size,
        }

    def __iter__(self) -> Iterator[Any]:
        """Yield the (remaining) batches of the epoch."""
        epoch, start = self.epoch, self._start
        self._start = 0
        for step, batch in enumerate(self._batches(epoch, start), start + 1):
            # Moved on before the batch is handed out: whoever stops here has used it.
            self.epoch, self._step = (epoch, step) if step < self.plan.steps else (epoch + 1, 0)
            yield batch

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield the batches ``start .. steps - 1`` of an epoch."""
        raise NotImplementedError
