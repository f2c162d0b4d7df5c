"""The transfer benchmark on a small problem."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dinovmf_plugin.benchmarks import transfer


def test_report__has_times_and_what_was_chosen(tmp_path, capsys):
    path = tmp_path / "transfer.json"
    small = ["rows=300", "dim=12", "classes=5", "values=3", "n_jobs=1,2"]
    transfer.main([*small, f"output={path}"])
    report = json.loads(path.read_text())
    one, two = report["results"]
    assert (one["n_jobs"], two["n_jobs"]) == (1, 2)
    for key in ("top1", "weight_decay", "unfinished_fits"):
        assert one[key] == two[key]
    assert one["weight_decay"] in [pytest.approx(10.0**e) for e in (-6, -0.5, 5)]
    assert 20 < one["top1"] < 100
    assert min(one["seconds"], two["seconds"]) > 0
    assert report["command"] == "python scripts/benchmark.py transfer " + " ".join(small)
    assert "3 strengths x 5 folds" in capsys.readouterr().out


def test_generated_features__share_their_classes_between_seeds():
    x, y = transfer.generated_features(400, 8, 2, seed=1)
    z, w = transfer.generated_features(400, 8, 2, seed=2)
    assert not np.array_equal(x, z)
    assert np.bincount(y).tolist() == [200, 200]
    assert x.std() == pytest.approx(1, abs=1e-3)
    apart = x[y == 0].mean(0) - x[y == 1].mean(0)
    again = z[w == 0].mean(0) - z[w == 1].mean(0)
    assert apart @ again > 0.8 * np.linalg.norm(apart) * np.linalg.norm(again)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("rows=0", "rows=0"), ("n_jobs=0", "n_jobs=0 must be"), ("fold=2", "did you mean folds")],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        transfer.main([argument])
