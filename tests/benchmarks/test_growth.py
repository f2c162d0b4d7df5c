"""The growth benchmark on small sizes: curves, slopes, a figure."""

from __future__ import annotations

import json

import pytest

from dinovmf_plugin.benchmarks import growth

SMALL = ["prototypes=32,64,128", "batches=2,4", "banks=300,600", "repeats=1", "memory=0"]


def test_report__curves_slopes_and_a_figure(tmp_path, capsys):
    path, figure = tmp_path / "growth.json", tmp_path / "growth.svg"
    growth.main([*SMALL, f"output={path}", f"figure={figure}"])
    results = json.loads(path.read_text())["results"]
    against_k = results["curves"]["seconds of a loss step against prototypes"]
    assert list(against_k["none"]) == ["32", "64", "128"]
    assert list(results["curves"]["seconds of kNN against rows of the bank"]["ours"]) == [
        "300",
        "600",
    ]
    for title, candidates in results["curves"].items():
        for name, points in candidates.items():
            numbers = {int(size): value for size, value in points.items()}
            assert results["slopes"][title][name] == pytest.approx(growth.slope(numbers))
    assert "slope" in capsys.readouterr().out
    assert "<svg" in figure.read_text()
    with pytest.raises(FileExistsError, match=r"growth\.svg"):
        growth.main([*SMALL, f"figure={figure}"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "prototypes=1024",
            "prototypes=1024 must be a list of whole numbers of at least 1, 2 at least",
        ),
        ("batches=", "batches= must be a list of whole numbers of at least 1, 2 at least"),
        ("banks=many,1", "banks=many,1 must be a list"),
        ("banks=10", "banks=10 must be at least two sizes"),
        ("precision=fp8", "precision=fp8 must be float32 or bf16"),
        ("figure=a.gif", "must be a path that ends in .svg"),
    ],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        growth.main([argument])
