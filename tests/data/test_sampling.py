from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader, sample_uniforms


class Batches(ResumableLoader):
    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        yield from ((epoch, list(map(int, batch))) for batch in self.plan.indices(epoch)[start:])


def test_plan__every_image_at_most_once_and_equal_steps_on_every_rank() -> None:
    plans = [EpochPlan(50, 4, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for epoch in range(5):
        shares = [plan.indices(epoch) for plan in plans]
        assert [share.shape for share in shares] == [(4, 4)] * 3
        used = np.concatenate([share.ravel() for share in shares])
        assert len(np.unique(used)) == len(used) == 48


def test_plan__last_batch_dropped_but_another_one_each_epoch() -> None:
    plan = EpochPlan(10, 4)
    assert plan.steps == 2
    used = [set(plan.indices(epoch).ravel().tolist()) for epoch in range(20)]
    assert all(len(images) == 8 for images in used)
    assert set.union(*used) == set(range(10))
    assert len({tuple(sorted(images)) for images in used}) > 5


def test_plan__global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    single = EpochPlan(50, 8, seed=4).indices(2)
    halves = [EpochPlan(50, 4, seed=4, rank=rank, world_size=2).indices(2) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), single)


def test_plan__seed_and_epoch_change_the_order() -> None:
    orders = [
        EpochPlan(20, 5, seed=seed).indices(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert orders[0] == EpochPlan(20, 5, seed=0).indices(0).tolist()


def test_plan__uniform_positions() -> None:
    """Each image comes equally often at each position."""
    first = [EpochPlan(6, 6, seed=0).indices(epoch)[0].tolist() for epoch in range(1200)]
    counts = np.array(
        [[column.count(image) for image in range(6)] for column in zip(*first, strict=True)]
    )
    assert np.abs(counts - 200).max() < 60


def test_uniforms__independent_of_each_other() -> None:
    keys = [(seed, epoch, index) for seed in (0, 7) for epoch in (0, 1) for index in range(50)]
    rows = np.array([sample_uniforms(*key, size=400) for key in keys])
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.25
    assert rows.mean() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="seed and epoch must not be negative, got seed -1"):
        sample_uniforms(-1, 0, 0, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"num_samples": 3, "batch_size": 4},
            r"fewer images \(3\) than one batch \(optimizer.batch_size = 4\)",
        ),
        (
            {"num_samples": 7, "batch_size": 4, "world_size": 2},
            r"\(7\) than one batch .* 4 x 2 processes",
        ),
        ({"num_samples": 3, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"num_samples": 9, "batch_size": 1, "rank": 2, "world_size": 2},
            "rank must be from 0 to 1, got 2",
        ),
    ],
)
def test_plan__bad_input(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlan(**kwargs)


def test_loader__epochs_follow_each_other() -> None:
    loader, plan = Batches(EpochPlan(10, 3)), EpochPlan(10, 3)
    assert len(loader) == 3
    for epoch in range(3):
        assert [batch for _, batch in loader] == plan.indices(epoch).tolist()
    assert loader.epoch == 3


def test_loader__left_early_starts_the_same_epoch_again() -> None:
    loader = Batches(EpochPlan(10, 3))
    first = next(iter(loader))
    assert next(iter(loader)) == first
    loader.sampler.set_epoch(4)
    assert next(iter(loader))[0] == 4


@pytest.mark.parametrize("consumed", [0, 1, 2, 3, 4, 5])
def test_loader__continues_where_the_state_was_taken(consumed: int) -> None:
    def endless(loader: Batches) -> Iterator[Any]:
        while True:
            yield from loader

    straight = endless(Batches(EpochPlan(10, 3)))
    whole = [next(straight) for _ in range(9)]
    interrupted = Batches(EpochPlan(10, 3))
    batches = endless(interrupted)
    for _ in range(consumed):
        next(batches)
    resumed = Batches(EpochPlan(10, 3))
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(resumed.epoch)  # what Lightning does before each epoch
    rest = endless(resumed)
    assert [next(rest) for _ in range(9 - consumed)] == whole[consumed:]


def test_loader__state_of_another_run() -> None:
    loader = Batches(EpochPlan(10, 3))
    next(iter(loader))
    with pytest.raises(
        ValueError, match=r"middle of the epoch: .*'batch_size': 3.*'batch_size': 2"
    ):
        Batches(EpochPlan(10, 2)).load_state_dict(loader.state_dict())
    for _ in loader:
        pass
    other = Batches(EpochPlan(10, 2))
    other.load_state_dict(loader.state_dict())  # between two epochs nothing has to fit
    assert other.epoch == 1
