"""The record of a run's own files: what it did not write is never moved, replaced or deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dinovmf_plugin.runs.written import RECORD, WrittenFiles


def _write(record: WrittenFiles, name: str, text: str, step: int = 0) -> Path:
    return record.write(name, lambda file: file.write(text.encode()), (0, step))


def _content(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != RECORD]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def test_own_files__moved_and_deleted_also_by_a_later_process(tmp_path):
    for step, name in enumerate(("b", "a")):
        _write(WrittenFiles(tmp_path), name, name, step)
    record = WrittenFiles(tmp_path)
    assert record.names() == ["b", "a"]  # in the order of their steps, not of their names
    (tmp_path / "previous").mkdir()
    assert record.move(tmp_path / "b", tmp_path / "previous" / "b") == tmp_path / "previous" / "b"
    again = WrittenFiles(tmp_path)
    assert again.owns(tmp_path / "previous" / "b")
    assert again.delete(tmp_path / "previous" / "b")
    assert again.delete(tmp_path / "a")
    assert _content(tmp_path) == {}


def test_foreign_files__stay(tmp_path):
    record = WrittenFiles(tmp_path)
    ours = _write(record, "ours", "ours")
    for name in ("theirs", "moved"):
        (tmp_path / name).write_text("theirs")
    assert record.move(tmp_path / "theirs", tmp_path / "x") is None
    assert not record.delete(tmp_path / "theirs")
    assert record.set_aside(tmp_path / "theirs") is None
    # their names are theirs
    assert record.move(ours, tmp_path / "moved") == tmp_path / "moved-2"
    assert _write(record, "theirs", "new") == tmp_path / "theirs-2"
    assert _content(tmp_path) == {
        "theirs": "theirs",
        "moved": "theirs",
        "moved-2": "ours",
        "theirs-2": "new",
    }


@pytest.mark.parametrize("damage", ["", "not json", "[]", '{"files": {}}', '{"files": 3}'])
def test_damaged_record__nothing_is_known_as_own(tmp_path, damage):
    path = _write(WrittenFiles(tmp_path), "a.ckpt", "a")
    (tmp_path / RECORD).write_text(damage)
    record = WrittenFiles(tmp_path)
    assert not record.delete(path)
    assert _write(record, "a.ckpt", "b") == tmp_path / "a-2.ckpt"


def test_file_in_the_place_of_a_recorded_one__is_foreign(tmp_path):
    """Of another size, of the same size and another time, and a link to somewhere else."""
    for replace in (
        lambda path: path.write_text("longer than before"),
        lambda path: (path.write_text("b"), os.utime(path, ns=(1, 1))),
        lambda path: (path.unlink(), path.symlink_to(tmp_path / "elsewhere")),
    ):
        record = WrittenFiles(tmp_path)
        path = _write(record, "a", "a")
        (tmp_path / "elsewhere").write_text("a")
        replace(path)
        assert not WrittenFiles(tmp_path).owns(path)
        assert not record.delete(path)
        path.unlink()


def test_failed_write__old_file_and_record_stay(tmp_path):
    record = WrittenFiles(tmp_path)
    path = _write(record, "a", "old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        record.write("a", fail, (0, 1))
    assert _content(tmp_path) == {"a": "old"}
    assert WrittenFiles(tmp_path).owns(path)


def test_killed_while_writing__the_half_file_is_known_and_cleared_away(tmp_path):
    process = os.fork()
    if process == 0:
        WrittenFiles(tmp_path).write("a", lambda file: (file.write(b"half"), os._exit(0)), (0, 0))
    os.waitpid(process, 0)
    (left_over,) = [p for p in tmp_path.iterdir() if p.name != RECORD]
    assert json.loads((tmp_path / RECORD).read_text())["unfinished"] == left_over.name
    (tmp_path / ".b.1.part").write_text("somebody else's")
    WrittenFiles(tmp_path).clear_unfinished()
    assert _content(tmp_path) == {".b.1.part": "somebody else's"}


def test_same_name_again__replaces_the_own_file(tmp_path):
    record = WrittenFiles(tmp_path)
    _write(record, "a", "old")
    assert _write(record, "a", "new") == tmp_path / "a"
    assert _content(tmp_path) == {"a": "new"}
    assert WrittenFiles(tmp_path).owns(tmp_path / "a")
