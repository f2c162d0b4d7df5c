"""The loss benchmark on a small problem: it measures, compares and never overwrites."""

from __future__ import annotations

import json

import pytest
import torch

from dinovmf_plugin.benchmarks import loss
from dinovmf_plugin.benchmarks.loss_candidates import Workload
from dinovmf_plugin.benchmarks.settings import LossSettings

SMALL = ["batch=2", "prototypes=96", "dim=16", "crops=3", "repeats=1"]


def test_report__has_times_ratios_and_equal_gradients(tmp_path, capsys):
    path = tmp_path / "loss.json"
    names = "none,vmf,per_pair,products"
    loss.main([*SMALL, "memory=0", f"candidates={names}", "precision=float32", f"output={path}"])
    report = json.loads(path.read_text())
    (row,) = report["results"]
    assert row["batch"] == 2
    assert list(row["median"]) == names.split(",")
    for name, ratio in row["time_ratio"].items():
        assert ratio == pytest.approx(row["median"][name] / row["median"]["none"])
    assert max(row["difference"]["per_pair"].values()) < 1e-4
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert "per_pair" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"loss\.json"):
        loss.main([*SMALL, f"output={path}"])


def test_lightly__has_the_same_loss_and_gradients():
    pytest.importorskip("lightly")
    load = Workload(2, 96, 16, 3, half=False)
    ours, theirs = (load.candidate(name)() for name in ("none", "lightly"))
    assert set(ours) == {"loss", "embeddings", "weight_v", "weight_g"}
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bach=3", "bach is no known key: did you mean batch"),
        ("batch=two", "batch=two must be a list of whole numbers"),
        ("precision=fp8", "precision=fp8 must be a list of float32 or bf16"),
        ("candidates=none,theirs", "candidates=none,theirs must be a list of none, vmf, "),
        ("candidates=", "candidates= must be a list of none, vmf, "),
        ("device=tpu", "device=tpu must be cpu or cuda"),
        ("repeats=many", "repeats=many must be a whole number"),
        ("slow_seconds=nan", "slow_seconds=nan must be a number above 0"),
        ("repeats", "repeats must be key=value with one of output, batch"),
    ],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        loss.main([argument])


def test_peak_memory__counts_what_a_step_needs():
    settings = LossSettings(prototypes=8192, dim=16, crops=2)
    # in a process of its own: here, memory that other tests have freed would be used again
    peak = 1e6 * loss.fresh_peak("products", settings, 256, half=False)
    logits = 4 * 8192 * 4 * 256  # bytes of the student's logits alone
    assert 0.95 * logits < peak < 4 * logits
