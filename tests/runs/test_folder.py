"""The one rule of every ``output_dir``: bound to settings, finished results moved aside."""

from __future__ import annotations

import json

import pytest

from dinovmf_plugin.runs.folder import open_run_folder


def test_new_folder__is_made_and_bound(tmp_path):
    folder = open_run_folder(tmp_path / "a" / "b", {"imsize": 224, "scales": (1.0, 0.5)})
    assert folder == tmp_path / "a" / "b"
    bound = json.loads((folder / "settings.json").read_text())
    assert bound.pop("plugin_version")
    assert bound == {"imsize": 224, "scales": [1.0, 0.5]}


def test_same_settings__go_on_and_move_finished_results_aside(tmp_path, capsys):
    for number in range(3):
        open_run_folder(tmp_path, {"k": 10}, ("results.json", "report.html"))
        (tmp_path / "results.json").write_text(str(number))
    names = {path.name: path.read_text() for path in tmp_path.glob("results*")}
    assert names == {"results.json": "2", "results.1.json": "0", "results.2.json": "1"}
    assert "kept the previous results.json as results.2.json" in capsys.readouterr().out


def test_other_settings__are_refused_by_name_and_nothing_moves(tmp_path):
    open_run_folder(tmp_path, {"k": 10, "which": "teacher"})
    (tmp_path / "results.json").write_text("1")
    with pytest.raises(ValueError, match=r"of other settings \(k was 10, is now 20\): choose"):
        open_run_folder(tmp_path, {"k": 20, "which": "teacher"}, ("results.json",))
    with pytest.raises(ValueError, match=r"\(which was 'teacher', is now None\)"):
        open_run_folder(tmp_path, {"k": 10}, ("results.json",))
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "results.json"}


def test_foreign_folder__is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and has no settings.json"):
        open_run_folder(tmp_path, {"k": 10})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_results_alone__lie_beside_others(tmp_path):
    (tmp_path / "last.ckpt").write_text("")
    assert open_run_folder(tmp_path, results=("knn.json",)) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file__is_no_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        open_run_folder(tmp_path / "a", results=("knn.json",))
