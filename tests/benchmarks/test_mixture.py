"""The benchmark of mixtures: its candidates do the same job, and what it prints."""

from __future__ import annotations

import json
import sys
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from dinovmf_plugin.benchmarks import mixture
from dinovmf_plugin.benchmarks.settings import MixtureCandidate


@pytest.mark.parametrize("name", get_args(MixtureCandidate))
def test_candidates__find_what_is_easy(name):
    if name == "chemomae":
        pytest.importorskip("chemomae")
    x, labels = mixture.workload(3000, 16, 3)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    found = mixture.fit(name, x, 3, 50, 0)
    for k in range(3):
        mean = x[labels == k].mean(axis=0)
        assert (found.directions_ @ (mean / np.linalg.norm(mean))).max() > 0.99
    best = mixture.fit("ours", x, 3, 50, 0).score(x)
    assert best >= found.score(x) - 1e-3  # nobody is more likely than maximum likelihood
    assert found.score(x) > best - 1.0


def test_gaussian_on_the_sphere__is_a_vmf():
    # density ratios of N(m, s^2 I) between unit vectors are those of vMF(m / |m|, |m| / s^2)
    mean, variance, x = np.array([0.6, 0.2, 0.1]), 0.05, np.eye(3)
    gaussian = stats.multivariate_normal(mean, variance * np.eye(3)).logpdf(x)
    norm = np.linalg.norm(mean)
    vmf = stats.vonmises_fisher(mean / norm, norm / variance).logpdf(x)
    np.testing.assert_allclose(np.diff(gaussian), np.diff(vmf))


def test_main__writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "out.json"
    small = ["shapes=300x8x3", "held_out=100", "seeds=2", "memory=0", "candidates=ours,gaussian"]
    mixture.main([*small, f"output={path}"])
    out = capsys.readouterr().out
    assert "300 rows x 8, 3 components" in out
    row = json.loads(path.read_text())["results"][0]["candidates"]["ours"]
    assert len(row["log_likelihood"]) == len(row["seconds"]) == 2
    assert row["adjusted_rand"][0] > 0.5


def test_without_chemomae__it_is_left_out_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "chemomae", None)
    mixture.main(["shapes=100x4x2", "held_out=20", "seeds=1", "memory=0", "max_iter=2"])
    out = capsys.readouterr().out
    assert "chemomae is not installed: left out (pip install chemomae" in out
    assert "  chemomae " not in out


def test_arguments__named_when_wrong():
    with pytest.raises(ValueError, match="shapes=5x5 must be a list of ROWSxDIMENSIONSxCOMPONENTS"):
        mixture.main(["shapes=5x5"])
    with pytest.raises(ValueError, match="candidates=theirs must be a list of ours, chemomae"):
        mixture.main(["candidates=theirs"])
