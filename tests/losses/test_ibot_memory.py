"""The memory benchmark compares like with like."""

from __future__ import annotations

import pytest
import torch

from dinovmf_plugin.benchmarks import memory
from dinovmf_plugin.benchmarks.settings import MemorySettings

SMALL = MemorySettings(batch=3, crops=2, grid=14, prototypes=40, dim=16)


def test_candidates__same_loss_center_and_gradients():
    load = memory.Workload(SMALL)
    ours, plain = load.run("ibot"), load.run("plain")
    assert 0 < int(load.masks.sum()) < load.masks.numel()
    assert ours.keys() == plain.keys() >= {"loss", "center", "cls", "patches", "weight_v"}
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batches=3", "batches is no known key: did you mean batch"),
        ("batch=many", "batch=many must be a whole number"),
        ("candidates=dino", "candidates=dino must be a list of ibot"),
    ],
)
def test_main__bad_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        memory.main([argument])


def test_main__existing_output__is_not_replaced(tmp_path):
    path = tmp_path / "memory.json"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists: remove it"):
        memory.main([f"output={path}"])
    assert path.read_text() == "precious"
