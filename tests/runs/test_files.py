"""The one writer: a file is whole or what was there before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dinovmf_plugin.runs.files import keep_previous, replacing, write_file, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_file(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"x\.bin cannot be written: No space left on device"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="cannot be written"):
        write_file(path / "below", b"x")  # a file where a folder should be


def test_written_files_follow_the_umask(tmp_path):
    write_file(tmp_path / "x", b"1")
    Path(tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def _half_written(path):
    with replacing(path) as draft:
        draft.write_bytes(b"half")
        raise ValueError("differs")


def test_draft_of_a_failed_block__leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="differs"):
        _half_written(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_json__has_no_nan_and_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("inf"), 1: [float("nan"), 0.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "1": [None, 0.5]}


def test_previous_results__are_numbered_not_replaced(tmp_path):
    path = tmp_path / "knn.json"
    assert keep_previous(path) is None
    for number in (1, 2):
        path.write_text(str(number))
        assert keep_previous(path) == tmp_path / f"knn.{number}.json"
    assert (tmp_path / "knn.1.json").read_text() == "1"
