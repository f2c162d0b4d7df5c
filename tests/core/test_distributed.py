"""Reductions over ranks: two real processes with unequal numbers of rows equal one on the joined rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dinovmf_plugin.core import distributed


def _rows(counts: list[int], k: int = 7) -> list[torch.Tensor]:
    x = torch.randn(sum(counts), k, generator=torch.Generator().manual_seed(3)) * 100
    return list(x.split(counts))


def _reduce(rank: int, counts: list[int]) -> dict[str, object]:
    x = _rows(counts)[rank]
    return {
        "mean": distributed.mean_over_rows(x),
        "lse": distributed.logsumexp_over_ranks(x),
        "total": distributed.total(len(x)),
        "world_size": distributed.world_size(),
        "is_distributed": distributed.is_distributed(),
        "untouched": torch.equal(x, _rows(counts)[rank]),
    }


def test_reductions__unequal_and_empty_ranks__equal_one_process(ddp):
    for counts in ([5, 2], [4, 0]):
        joined = torch.cat(_rows(counts))
        for result in ddp(_reduce, counts):
            torch.testing.assert_close(result["mean"], joined.mean(0, keepdim=True))
            torch.testing.assert_close(result["lse"], torch.logsumexp(joined, 0, keepdim=True))
            assert result["total"] == sum(counts)
            assert result["world_size"] == 2
            assert result["is_distributed"] is True
            assert result["untouched"]


def test_reductions__without_group__plain_functions():
    assert not dist.is_initialized()
    x = _rows([6])[0]
    assert not distributed.is_distributed()
    assert distributed.world_size() == 1
    assert distributed.total(6) == 6
    assert distributed.total(0) == 1
    torch.testing.assert_close(distributed.mean_over_rows(x), x.mean(0, keepdim=True))
    torch.testing.assert_close(
        distributed.logsumexp_over_ranks(x), torch.logsumexp(x, 0, keepdim=True)
    )
