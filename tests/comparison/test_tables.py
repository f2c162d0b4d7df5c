"""Statistics against numpy and scipy, the layout of the tables, the page, stability."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dinovmf_plugin.comparison import collect as collecting
from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.comparison.results import group_runs, read_results
from dinovmf_plugin.comparison.statistics import describe_difference, mean_and_std
from dinovmf_plugin.comparison.tables import breaking_points, comparison_table

ACCURACY = {
    ("none", "logit"): [70.0, 71.0, 72.0],
    ("none", "probability"): [70.8, 70.7, 72.4],
    ("l2", "logit"): [60.0, 60.1, 60.2],
    ("vmf", "probability"): [80.0, 80.2, 80.1],
}


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are tested without the seconds that drawing takes; the page has a test of its own."""
    blank = {"light": b"", "dark": b""}
    monkeypatch.setattr(collecting, "curve_charts", lambda *_: [])
    monkeypatch.setattr(collecting, "seeds_chart", lambda *_: blank)


def _cells() -> list[tuple[Any, ...]]:
    return [
        (
            f"dino_multicrop normalization={n}, centering={c}",
            seed,
            values[seed],
            {"switches": (n, c)},
        )
        for (n, c), values in ACCURACY.items()
        for seed in range(3)
    ]


def test_mean_and_std_are_those_of_the_sample() -> None:
    values = np.random.default_rng(0).normal(70, 3, size=5).tolist()
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(np.mean(values))
    assert std == pytest.approx(np.sqrt(np.sum((values - np.mean(values)) ** 2) / 4))
    with pytest.raises(ValueError, match="no value"):
        mean_and_std([])


def _seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_difference_within_the_spread_is_called_that() -> None:
    text = describe_difference("a", _seeds(70.0, 72.0, 74.0), "b", _seeds(69.0, 73.0, 73.5))
    assert "do not differ beyond the spread of the seeds" in text
    p = stats.ttest_rel([70.0, 72.0, 74.0], [69.0, 73.0, 73.5]).pvalue
    assert f"p = {p:.2g}." in text


def test_difference_that_every_seed_shows_has_the_paired_p_however_far_the_seeds_are_apart() -> (
    None
):
    a, b = _seeds(60.0, 70.2, 80.1), _seeds(58.0, 68.0, 78.0)
    differences = np.array([2.0, 2.2, 2.1])
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    p = 2 * stats.t.sf(t, 2)
    text = describe_difference("a", a, "b", b)
    assert text == f"a is above b: +2.1 ± 0.10 points over 3 paired seeds, p = {p:.2g}.".replace(
        "2.1 ", "2.10 "
    )
    assert "b is below a: -2.10" in describe_difference("b", b, "a", a)
    # only seeds that both have
    assert "2 paired seeds" in describe_difference(
        "a", {0: 1.0, 1: 2.5, 5: 9.0}, "b", _seeds(1.0, 2.0)
    )


def _unpadded(path: Path) -> str:
    """Markdown with the padding of its table cells taken away."""
    lines = path.read_text().replace("\u00a0", " ").splitlines()
    return "\n".join(
        f"| {' | '.join(cell.strip() for cell in line.strip('|').split('|'))} |"
        if line.startswith("|")
        else line
        for line in lines
        if not line.startswith("|:-")
    )


def test_one_seed_shows_nothing() -> None:
    assert "shows nothing" in describe_difference("a", {0: 90.0}, "b", _seeds(10.0, 20.0))


def test_two_seeds_are_not_tested__even_if_they_agree() -> None:
    text = describe_difference("a", _seeds(56.1, 54.9), "b", _seeds(56.8, 55.6))
    assert text == "a against b: -0.70 ± 0.00 points over 2 paired seeds, too few for a test."


def test_equal_differences__up_to_rounding__are_no_test() -> None:
    text = describe_difference("a", _seeds(0.3, 1.3, 2.3), "b", _seeds(0.1, 1.1, 2.1))
    assert text == "a is above b: +0.20 points with each of 3 paired seeds."


def test_ablation_has_the_layout_of_table_1(write_results: Any, no_charts: None) -> None:
    root = write_results(*_cells(), kind="ablation")
    summary = collect(root)
    text = _unpadded(root / "ablation.md")
    assert (
        "| normalization | logit | probability | paper, ImageNet: logit | paper, ImageNet: probability |\n"
        "| none | 71.0 ± 1.0 | 71.3 ± 1.0 | 70.18 | 70.49 |\n"
        "| l2 | 60.1 ± 0.1 | – | 69.51 | 69.86 |\n"
        "| vmf | – | 80.1 ± 0.1 | 70.21 | 70.87 |\n"
    ) in text
    stored = json.loads((root / "ablation.json").read_text())
    assert stored["sentences"] == summary["sentences"]
    for group in stored["groups"]:
        values = ACCURACY[group["normalization"], group["centering"]]
        knn = group["metrics"]["knn_k10"]
        assert knn["values"] == values
        assert knn["mean"] == pytest.approx(np.mean(values))
        assert knn["std"] == pytest.approx(np.std(values, ddof=1))
    # against DINO's own cell: one within the spread, one below, one above
    within, below, above = summary["sentences"]
    assert "do not differ" in within
    assert "is below none + logit: -10.90" in below
    assert "is above none + logit: +9.10" in above
    assert summary["hours"] == pytest.approx(12 * 36 / 3600, abs=1e-3)


def test_page_stands_alone_in_light_and_dark(write_results: Any) -> None:
    root = write_results(*_cells(), kind="ablation")
    Image.new("RGB", (8, 8)).save(root / "runs" / "dino_multicrop" / "03" / "crops.png")
    summary = collect(root)
    page = (root / "ablation.html").read_text()
    assert page.count("prefers-color-scheme: dark") > 3
    assert "http" not in page.replace("http://www.w3.org", "")
    for sentence in summary["sentences"]:
        assert sentence.replace("'", "&#39;") in page
    for title in ("Over time", "Prototypes of the teacher", "Every run", "What the networks see"):
        assert title in page


def test_comparison_table_and_the_papers_numbers(write_results: Any, no_charts: None) -> None:
    runs = [
        (m, s, 70.0 + s + 5 * (m == "dino_vmf"))
        for m, s in product(("dino_multicrop", "dino_vmf"), (0, 1))
    ]
    root = write_results(*runs)
    collect(root)
    text = _unpadded(root / "compare.md")
    assert "|  | kNN, k = 10 | linear [C] | unique prototypes | seeds |" in text
    assert "| dino_vmf | 75.5 ± 0.7 | 77.5 ± 0.7 | 50 ± 1 | 2 |" in text
    assert "| DINO-vMF | 74.74 | 76.19 | 76.97 | 39.2 | 49.4 | 59.1 | 65 |" in text
    assert "not on this data" in text
    # unique prototypes 50 and 51, one of two runs with a void set
    assert (
        "| dino_vmf | 50 ± 1 | 9 ± 0 | 1 of 2 | 30 ± 0 | 8.0 ± 0.0 | 10.5 ± 0.7 | 12.0 ± 0.0 | -0.55 ± 0.07 |"
        in text
    )
    assert "| dino_vmf | 2 | 75.5 ± 0.7 | – | – | – | 30 ± 0 | 20.5 ± 0.7 |" in text
    assert "untrained 60.0 %" in text


def test_collapsed_runs__count_in_no_mean_and_a_collapsed_group_is_no_row(
    write_results: Any, no_charts: None
) -> None:
    root = write_results(
        ("dino_multicrop", 0, 70.0),
        ("dino_multicrop", 1, 20.0, {"outcome": "uniform"}),
        ("dino_vmf", 0, 71.0),
        ("dino_vmf", 1, 73.0),
        ("ibot", 0, 30.0, {"outcome": "uniform"}),
        ("ibot", 1, 31.0, {"outcome": "information lost"}),
    )
    summary = collect(root)
    text = _unpadded(root / "compare.md")
    top, every = text.split("**Every run**")
    assert "| dino_multicrop | 70.0 (1 of 2 uniform) |" in top
    assert "| dino_vmf | 72.0 ± 1.4 |" in top
    assert "| ibot |" not in top
    assert "| ibot | 1 | 31.0 | – | – | – | – | information lost |" in every
    first, second = summary["sentences"]
    assert first == ("ibot is not compared: 1 of 2 runs uniform, 1 of 2 runs information lost.")
    assert "with 1 seed(s) in common" in second


def test_stability_names_where_each_breaks(write_results: Any) -> None:
    runs: list[tuple[Any, ...]] = []
    for seed in (0, 1):
        runs += [
            ("dino_multicrop", seed, 70.0, {"lr": 0.1}),
            ("dino_multicrop", seed, None if seed else 71.0,
             {"lr": 0.2, "outcome": "diverged" if seed else "trains"}),
            ("dino_multicrop", seed, 50.0, {"lr": 0.4, "outcome": "below untrained"}),
            ("dino_vmf", seed, 72.0, {"lr": 0.1}),
            ("dino_vmf", seed, 73.0, {"lr": 0.4}),
        ]  # fmt: skip
    root = write_results(*runs)
    found = breaking_points(group_runs(read_results(root)))
    assert found["dino_multicrop"]["breaks_at"] == 0.2
    assert found["dino_multicrop"]["outcomes"] == {"diverged": 1}
    assert found["dino_multicrop"]["highest_whole"] == 0.1
    assert found["dino_vmf"]["breaks_at"] is None
    summary = collect(root)
    first, second = summary["sentences"]
    assert (
        "breaks at learning rate 0.2 (1 diverged of 2 seeds); all runs trained up to 0.1" in first
    )
    assert "did not break at any learning rate tried, up to 0.4" in second
    text = _unpadded(root / "compare.md")
    assert (
        "| dino_multicrop | 70.0 ± 0.0 | 71.0; 1 of 2 diverged | 2 of 2 below untrained |" in text
    )
    assert "| dino_vmf | 72.0 ± 0.0 | – | 73.0 ± 0.0 |" in text
    assert "the loss became nan at step 3" in (root / "compare.html").read_text()


def test_ablation__third_axis__one_table_per_weight(write_results: Any, no_charts: None) -> None:
    label = "dino_multicrop normalization=vmf, centering=probability, prototype_spread={}"
    switches = {"switches": ("vmf", "probability")}
    runs = [
        (label.format(weight), seed, knn + seed, {**switches, "spread": weight})
        for weight, knn in ((0.0, 60.0), (0.1, 70.0))
        for seed in (0, 1)
    ]
    root = write_results(*runs, kind="ablation")
    collect(root)
    text = _unpadded(root / "ablation.md")
    assert "kNN, k = 10, top-1 (%), prototype_spread=0**" in text
    assert "kNN, k = 10, top-1 (%), prototype_spread=0.1**" in text
    first, second = (text.split(f"prototype_spread={w}**")[1].split("**")[0] for w in ("0", "0.1"))
    assert "60.5 ± 0.7" in first
    assert "70.5 ± 0.7" in second
    assert "vmf + probability + spread 0.1" in text


def test_comparison_table__unique_prototypes_are_a_column(write_results: Any) -> None:
    root = write_results(("dino_vmf", 0, 70.0), ("dino_vmf", 1, 71.0), ("msn", 0, 50.0))
    table = comparison_table(group_runs(read_results(root)), ["knn_k10"])
    assert table.header == ["", "kNN, k = 10", "unique prototypes", "seeds"]
    # written in conftest: 50 plus the seed
    assert [row[2] for row in table.rows] == ["50 ± 1", "50"]
