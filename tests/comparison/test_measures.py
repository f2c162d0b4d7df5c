"""Differences over paired seeds against scipy; the picture of the six cells shows the recorded values."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from scipy import stats

from dinovmf_plugin.comparison import __main__ as command
from dinovmf_plugin.comparison.cells import cells_figure, cells_of
from dinovmf_plugin.comparison.charts import void_figure
from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.comparison.measures import differences_table, learning_table
from dinovmf_plugin.comparison.results import group_runs, read_results

USED = {"dino_multicrop": [20.0, 21.0, 23.0], "dino_vmf": [150.0, 154.0, 171.0]}
INFORMATION = {"dino_multicrop": [2.8, 2.9, 2.85], "dino_vmf": [4.1, 4.22, 4.14]}
KNN = {"dino_multicrop": [56.0, 57.0, 55.0], "dino_vmf": [55.5, 57.5, 55.1]}
SWITCHES = {"dino_multicrop": ("none", "logit"), "dino_vmf": ("vmf", "probability")}


@pytest.fixture
def two_cells(write_results: Any) -> Path:
    """DINO and DINO-vMF with three seeds each, and a run of KoLeo-proto; with known measures."""
    runs = [
        (label, seed, KNN[label][seed], {"switches": SWITCHES[label]})
        for label in KNN
        for seed in range(3)
    ]
    spread = {"switches": SWITCHES["dino_vmf"], "spread": 0.1}
    root: Path = write_results(*runs, ("dino_vmf prototype_spread=0.1", 0, 50.0, spread))
    for path in root.rglob("result.json"):
        run = json.loads(path.read_text())
        if run["label"] in USED:
            run["prototypes"]["usage"]["usage_perplexity"] = USED[run["label"]][run["seed"]]
            record = {"step": 9, "target_information": INFORMATION[run["label"]][run["seed"]]}
            record |= {"student_information_share": 0.2, "loss_over_log_k": 0.4 + run["seed"] / 10}
            run["monitor"]["step"] = [record]
            path.write_text(json.dumps(run))
    return root


def test_differences__are_paired__with_the_p_of_scipy(two_cells: Path) -> None:
    groups = group_runs(read_results(two_cells))
    table = differences_table(groups, groups[0], "knn_k10")
    assert table is not None
    assert table.header == [
        "less dino_multicrop", "kNN, points", "I, nats", "components in use, perplexity",
        "log p(y), held out, nats", "paired seeds",
    ]  # fmt: skip
    vmf, koleo = table.rows
    assert [vmf[0], vmf[5], koleo[0], koleo[5]] == [
        "dino_vmf", "3", "dino_vmf prototype_spread=0.1", "1",
    ]  # fmt: skip
    for cell, values in zip(vmf[1:4], (KNN, INFORMATION, USED), strict=True):
        mean, std, p = map(float, re.findall(r"-?[\d.]+(?:e-\d+)?", cell))
        expected = [b - a for a, b in zip(*values.values(), strict=True)]
        assert mean == pytest.approx(sum(expected) / 3, abs=0.06)
        assert std == pytest.approx(stats.tstd(expected), abs=0.06)
        assert p == pytest.approx(stats.ttest_1samp(expected, 0).pvalue, rel=0.5)
        assert cell.startswith("+") == (mean >= 0)
    assert vmf[4] == "+0.0 ± 0.0"  # the same in every seed: nothing to test
    assert koleo[1] == "-6.00"  # one seed


def test_learning__is_mean_and_spread_of_what_the_runs_recorded(two_cells: Path) -> None:
    groups = group_runs(read_results(two_cells))
    table = learning_table(groups, "knn_k10")
    assert table is not None
    assert table.header == [
        "", "seeds", "kNN (%)", "I, nats", "student's share (%)", "loss / log K (%)",
        "components in use", "log p(y), held out",
    ]  # fmt: skip
    assert table.rows[0] == [
        "dino_multicrop", "3", "56.0 ± 1.0", "2.85 ± 0.05", "20.0 ± 0.0", "50.0 ± 10.0",
        "21 ± 2", "21.0 ± 1.0",
    ]  # fmt: skip
    assert table.rows[2][3] == "–"  # nothing was recorded
    for run in groups[2].runs:
        run["prototypes"] = None
    assert learning_table(groups[2:], "knn_k10") is None


def test_against__names_what_the_others_are_compared_to(two_cells: Path) -> None:
    collect(two_cells, against="dino_vmf")
    text = (two_cells / "compare.md").read_text()
    assert "**Differences from dino_vmf**" in text
    assert "dino_multicrop is" in text or "dino_multicrop and dino_vmf" in text
    with pytest.raises(ValueError, match=r"against='ibot' must be one of .*dino_multicrop, dino_v"):
        collect(two_cells, against="ibot")


def _dots(figure: Figure) -> list[list[list[float]]]:
    """Of every panel, the values of every cell's dots."""
    return [
        [list(map(float, line.get_ydata())) for line in axes.lines if line.get_marker() == "o"]  # type: ignore[arg-type]
        for axes in figure.axes
    ]


def test_cells__every_seed_is_a_dot__other_methods_are_left_out(two_cells: Path) -> None:
    groups = group_runs(read_results(two_cells))
    assert [(cell, group.label) for cell, group in cells_of(groups).items()] == [
        (("none", "logit"), "dino_multicrop"),
        (("vmf", "probability"), "dino_vmf"),
    ]
    figure = cells_figure(groups, "knn_k10")
    assert _dots(figure) == [list(USED.values()), list(KNN.values())]
    names = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert names == ["none\nDINO", "vmf\nDINO-vMF"]
    assert 60.0 in [float(line.get_ydata()[0]) for line in figure.axes[1].lines]  # type: ignore[index,arg-type]


def test_void__lines_are_the_records_over_the_epochs(two_cells: Path) -> None:
    groups = group_runs(read_results(two_cells))[:2]
    with pytest.raises(ValueError, match="no run has recorded win_share"):
        void_figure(groups)
    for at, group in enumerate(groups):
        for run in group.runs:
            run["monitor"]["epoch"] = [
                {
                    "epoch": epoch,
                    "win_share": 0.5 / (epoch + 1),
                    "largest_duplicate_share": 0.3 * epoch,
                    "data_cosine_median": -0.1 * (at + epoch + run["seed"]),
                }
                for epoch in (0, 1)
            ]
    wins, copies, cosines = void_figure(groups).axes
    assert [list(line.get_ydata()) for line in wins.lines] == [[50.0, 25.0]] * 6  # type: ignore[arg-type]
    assert list(copies.lines[0].get_ydata()) == [0.0, 30.0]  # type: ignore[arg-type]
    assert list(cosines.lines[5].get_xdata()) == [1, 2]  # type: ignore[arg-type]
    assert list(cosines.lines[5].get_ydata()) == pytest.approx([-0.3, -0.4])  # type: ignore[arg-type]


def test_command__draws_the_cells__never_over_a_file(
    two_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "cells.svg"

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["comparison", str(two_cells), *arguments])
        command.main()

    run("--cells", str(picture))
    drawn = picture.read_bytes()
    assert b"<svg" in drawn
    for arguments, told in (
        (("--cells", str(picture)), "exists"),
        (("--cells", "cells.txt"), "must end in one of .svg, .png, .pdf"),
    ):
        (two_cells / "compare.json").unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            run(*arguments)
        assert told in capsys.readouterr().err
        assert not (two_cells / "compare.json").exists()  # refused before anything is written
    assert picture.read_bytes() == drawn
