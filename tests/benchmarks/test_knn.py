"""The kNN benchmark on a small problem: it measures, compares and never overwrites."""

from __future__ import annotations

import json
import sys

import pytest

from dinovmf_plugin.benchmarks import knn
from dinovmf_plugin.benchmarks.settings import KnnSettings

SMALL = ["shapes=600x64,400x48", "queries=30", "classes=12", "repeats=2", "ks=1,7"]


def test_report__has_times_accuracies_and_the_command(tmp_path, capsys):
    path = tmp_path / "results" / "knn.json"
    knn.main([*SMALL, "memory=0", "candidates=ours", f"output={path}"])
    report = json.loads(path.read_text())
    first, second = report["results"]
    assert (first["bank"], second["bank"]) == ([600, 64], [400, 48])
    assert len(first["seconds"]["ours"]) == 2
    assert first["seconds_per_1000_queries"]["ours"] == pytest.approx(
        1000 / 30 * first["median"]["ours"]
    )
    assert set(first["accuracy"]) == {"k1", "k7"}
    assert 100 / 12 < first["accuracy"]["k7"]["top1"] < 100
    assert str(tmp_path) not in path.read_text()  # no path of this machine
    assert report["command"].startswith("python scripts/benchmark.py knn shapes=600x64,400x48")
    assert "ours" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"knn\.json"):
        knn.main([*SMALL, f"output={path}"])


def test_faiss__does_the_same_job():
    pytest.importorskip("faiss")
    settings = KnnSettings(queries=50, classes=9, ks=(1, 7), repeats=1)
    row = knn.measure(700, 10, ["ours", "faiss"], settings)
    assert row["difference"] == 0
    assert set(row["parts"]) == {"build", "search"}
    assert sum(row["parts"].values()) < row["median"]["faiss"]


def test_without_faiss__it_is_left_out_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    knn.main([*SMALL, "memory=0"])
    out = capsys.readouterr().out
    assert "faiss is not installed: left out (pip install faiss-cpu" in out
    assert "faiss takes" not in out


def test_peak_memory__does_not_grow_with_bank_or_queries():
    settings = KnnSettings(queries=3000, ks=(10,))
    peak = knn.peak_memory(60000, 8, "ours", settings)
    assert peak < 0.3 * 4 * 60000 * 3000  # bytes of all similarities


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shape=3x3", "shape is no known key: did you mean shapes"),
        ("shapes=3by3", "shapes=3by3 must be a list of ROWSxDIMENSIONS"),
        ("shapes=0x3", "shapes=0x3 must be"),
        ("ks=0", "ks=0 must be a list of whole numbers"),
        ("dtype=int8", "dtype=int8 must be float32 or float16"),
        ("candidates=ours,theirs", "candidates=ours,theirs must be a list of ours or faiss"),
        ("queries=0", "queries=0 must be a whole number of at least 1"),
        ("repeats=many", "repeats=many must be a whole number"),
    ],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        knn.main([argument])
