"""The chart of what is learnt: its lines are the records; the analysis finds them beside the checkpoint."""

from __future__ import annotations

import json

import matplotlib as mpl
import pytest

from dinovmf_plugin.analysis.charts import monitored
from dinovmf_plugin.report.learning import learning_chart, learning_figure
from dinovmf_plugin.report.theme import THEMES

RECORDS = [
    {"step": 20, "target_information_share": 0.3, "student_information_share": 0.1},
    {"step": 40, "target_information_share": None, "student_information_share": None},
    {"step": 60, "target_information_share": 0.5, "student_information_share": 0.4},
    {"step": 80, "kl": 0.1},
]


def test_lines__are_the_records_that_know():
    with mpl.rc_context(THEMES["light"]):
        (axes,) = learning_figure({"a": RECORDS, "b": RECORDS[:1]}).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() != ":"]
    assert [list(line.get_xdata()) for line in lines[:2]] == [[20, 60], [20, 60]]
    assert [list(line.get_ydata()) for line in lines[:2]] == [[0.3, 0.5], [0.1, 0.4]]
    low, high = axes.get_ylim()
    assert low < 0.03 < 0.5 < high


@pytest.mark.parametrize("previous", [False, True])
def test_analysis__reads_the_monitor_beside_the_checkpoint(tmp_path, previous):
    lines = [{"kind": "step", **record} for record in RECORDS]
    text = "\n".join(map(json.dumps, [{"kind": "start", "step": 0}, *lines]))
    (tmp_path / "monitor.jsonl").write_text(text + "\n")
    folder = tmp_path / "previous" if previous else tmp_path
    models = {"dino": {"checkpoint": str(folder / "x.ckpt")}, "other": {"checkpoint": "/no/y.pth"}}
    found = monitored(models)
    assert [r["step"] for r in found["dino"]] == [20, 40, 60, 80]
    assert found["other"] == []
    assert sorted(learning_chart(found)) == ["dark", "light"]
    assert learning_chart({"other": []}) is None
