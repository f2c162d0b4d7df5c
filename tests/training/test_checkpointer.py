"""The checkpointer: whole files only, nothing overwritten, readable errors."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from dinovmf_plugin import host
from dinovmf_plugin.training.checkpointer import Checkpointer
from dinovmf_plugin.training.folders import find_checkpoint, is_whole, run_identity
from tests.training import small_runs
from tests.training.small_runs import checkpointer_of, files_in, first_epoch, run_cfg, train

# ---- files ---------------------------------------------------------------------------------------


def test_folder__one_checkpoint_the_one_before_and_the_config(tmp_path):
    cfg = run_cfg(tmp_path)
    last = checkpointer_of(train(cfg)).last_ckpt
    folder = tmp_path / "dino_vmf" / f"run-{run_identity(cfg)}"
    assert files_in(folder) == [
        "args.json",
        "checkpoints.json",
        "previous/run-ep1.ckpt",
        "run-ep2.ckpt",
        "run.lock",
    ]
    assert last == folder / "run-ep2.ckpt"
    assert json.loads((folder / "args.json").read_text()) == OmegaConf.to_container(cfg)
    weights = torch.load(last, weights_only=True)["state_dict"]["weight"]
    assert torch.equal(weights, torch.full((1000,), -6.0))


def test_keep_prev__all_of_them(tmp_path):
    cfg = run_cfg(tmp_path, **{"checkpoint.keep_prev": True})
    train(cfg, epochs=4)
    names = [name for name in files_in(tmp_path) if name.endswith(".ckpt")]
    assert [Path(name).name for name in names] == [f"run-ep{i}.ckpt" for i in range(4)]


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [(1, [3, 4]), (2, [3, 4]), (3, [2, 4]), (5, [4]), (9, [4]), (0, [3, 4])],
)
def test_frequency__last_epoch_in_any_case(tmp_path, frequency, expected):
    train(run_cfg(tmp_path, **{"checkpoint.frequency": frequency}), epochs=5)
    names = [Path(name).stem for name in files_in(tmp_path) if name.endswith(".ckpt")]
    assert sorted(names) == [f"run-ep{epoch}" for epoch in expected]


def test_second_start_of_the_same_run__leaves_the_first_alone(tmp_path):
    cfg = run_cfg(tmp_path)
    first = checkpointer_of(train(cfg, epochs=1)).last_ckpt
    content = first.read_bytes()
    second = checkpointer_of(train(cfg, epochs=2)).last_ckpt
    third = checkpointer_of(train(cfg, epochs=1)).last_ckpt
    assert first.read_bytes() == content
    identity = run_identity(cfg)
    assert [p.parent.name for p in (first, second, third)] == [
        f"run-{identity}",
        f"run-{identity}-2",
        f"run-{identity}-3",
    ]
    assert find_checkpoint(cfg) == third  # where a stopped run says that auto_resume goes on
    third.unlink()
    assert find_checkpoint(cfg) is None  # the last start had not come to a checkpoint


def test_resumed_run__stays_in_its_folder(tmp_path):
    cfg = run_cfg(tmp_path, **{"auto_resume.enabled": True})
    first = checkpointer_of(train(cfg, epochs=2)).last_ckpt
    for path in (first, first.parent / "previous" / "run-ep0.ckpt"):
        again = checkpointer_of(train(cfg, epochs=4, ckpt_path=path))
        assert again.path == first.parent
        assert again.last_ckpt == first.parent / "run-ep3.ckpt"
        weights = torch.load(again.last_ckpt, weights_only=True)["state_dict"]["weight"]
        assert torch.equal(weights, torch.full((1000,), -8.0))
        if path == first:
            first.parent.joinpath("previous", "run-ep0.ckpt").write_bytes(
                first_epoch(tmp_path / "other")
            )
    assert first.parent.joinpath("previous", "run-ep0.ckpt").exists()  # not this run's: put there
    assert len(list((tmp_path / "dino_vmf").iterdir())) == 1


def test_given_folder__is_used(tmp_path):
    """``pretrain`` chooses the folder for checkpoints, logs and monitors together."""
    cfg = run_cfg(tmp_path, **{"checkpoint.folder": str(tmp_path / "chosen")})
    assert checkpointer_of(train(cfg, epochs=1)).last_ckpt == tmp_path / "chosen" / "run-ep0.ckpt"


def test_run_folder__is_told_to_other_callbacks(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.folder = module.run_folder

    look = Look()
    trainer = train(run_cfg(tmp_path), epochs=1, callbacks=[look])
    assert Path(look.folder) == checkpointer_of(trainer).path


# ---- damage --------------------------------------------------------------------------------------


def test_failed_write__old_file_kept_and_named(tmp_path, monkeypatch):
    """A disk that is full when the second checkpoint is written; the real thing is in tests/robustness."""
    save, calls = torch.save, []

    def full_disk(content: Any, file: Any) -> None:
        calls.append(file)
        save(content, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    cfg = run_cfg(tmp_path)
    with pytest.raises(OSError) as caught:
        train(cfg)
    message = str(caught.value)
    assert "run-ep1.ckpt could not be written: No space left on device" in message
    assert "run-ep0.ckpt is untouched" in message
    names = ["args.json", "checkpoints.json", "run-ep0.ckpt", "run.lock"]
    assert [Path(n).name for n in files_in(tmp_path)] == names
    assert is_whole(find_checkpoint(cfg))


@pytest.mark.parametrize("key", ["name", "method"])
@pytest.mark.parametrize("value", ["../elsewhere", "/etc/run", "a/b", "..", ""])
def test_names_that_leave_the_folder__refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"{key}='{value}' must be a plain name"):
        Checkpointer(run_cfg(tmp_path, **{key: value}))


def test_damaged_newest__put_aside_so_that_it_does_not_displace_the_one_before(tmp_path):
    cfg = run_cfg(tmp_path, **{"auto_resume.enabled": True})
    newest = checkpointer_of(train(cfg, epochs=2)).last_ckpt
    newest.write_bytes(newest.read_bytes()[:1000])
    newest.with_name("run-ep1-step3.ckpt").write_bytes(b"PK half: somebody else's")
    before = find_checkpoint(cfg)
    assert before.name == "run-ep0.ckpt"
    train(cfg, epochs=3, ckpt_path=before)
    assert [n for n in files_in(newest.parent) if "ckpt" in n] == [
        "previous/run-ep1.ckpt",
        "run-ep1-step3.ckpt",
        "run-ep1.ckpt.damaged",
        "run-ep2.ckpt",
    ]
    assert is_whole(newest.with_name("previous") / "run-ep1.ckpt")


# ---- other people's files ------------------------------------------------------------------------


def _snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        n: ((folder / n).read_bytes(), (folder / n).stat().st_mtime_ns) for n in files_in(folder)
    }


@pytest.mark.parametrize("own_name", [False, True])
@pytest.mark.parametrize("keep_prev", [False, True])
def test_named_checkpoint__read_and_never_written(tmp_path, own_name, keep_prev):
    """Neither the file, nor anything beside it: also names that the run itself would use."""
    content = first_epoch(tmp_path / "first")
    models = tmp_path / "models"
    (models / "previous").mkdir(parents=True)
    named = models / ("run-ep0.ckpt" if own_name else "best.ckpt")
    for path in (named, models / "run-ep1.ckpt", models / "colleague.ckpt"):
        path.write_bytes(content)
    for name in ("previous/run-ep0.ckpt", "old-format.ckpt", "run-ep2.ckpt.tmp", "args.json"):
        (models / name).write_bytes(b"no archive")
    before = _snapshot(models)
    cfg = run_cfg(tmp_path / "new", **{"checkpoint.keep_prev": keep_prev})
    last = checkpointer_of(train(cfg, epochs=4, ckpt_path=named)).last_ckpt
    assert _snapshot(models) == before
    assert last.is_relative_to(tmp_path / "new" / "dino_vmf")
    names = [Path(n).name for n in files_in(tmp_path / "new") if n.endswith(".ckpt")]
    assert sorted(names) == [f"run-ep{i}.ckpt" for i in ((1, 2, 3) if keep_prev else (2, 3))]


def test_named_checkpoint_of_the_run_itself__a_folder_of_its_own_too(tmp_path):
    cfg = run_cfg(tmp_path)
    first = checkpointer_of(train(cfg, epochs=3)).last_ckpt
    before = _snapshot(first.parent)
    for path in (first, first.parent / "previous" / "run-ep1.ckpt"):
        last = checkpointer_of(train(cfg, epochs=5, ckpt_path=path)).last_ckpt
        assert last.parent.parent == first.parent.parent
        assert last.parent != first.parent
        assert _snapshot(first.parent) == before


@pytest.mark.parametrize("keep_prev", [False, True])
def test_foreign_files_in_the_runs_own_folder__stay(tmp_path, keep_prev):
    cfg = run_cfg(tmp_path, **{"auto_resume.enabled": True, "checkpoint.keep_prev": keep_prev})
    first = checkpointer_of(train(cfg, epochs=1)).last_ckpt
    folder, content = first.parent, first.read_bytes()
    theirs = ["best.ckpt", "run-ep2.ckpt", "run-ep9.ckpt", "previous/run-ep0.ckpt", "old.ckpt"]
    for name in theirs:
        (folder / name).write_bytes(b"no archive" if name == "old.ckpt" else content)
    (folder / "run-ep1.ckpt.tmp").write_bytes(b"half")
    theirs.append("run-ep1.ckpt.tmp")
    before = {name: value for name, value in _snapshot(folder).items() if name in theirs}
    assert find_checkpoint(cfg) == first  # run-ep9 was not written by this run
    last = checkpointer_of(train(cfg, epochs=5, ckpt_path=first)).last_ckpt
    after = _snapshot(folder)
    assert {name: after[name] for name in theirs} == before
    assert last == folder / "run-ep4.ckpt"
    ours = sorted(n for n in after if n.endswith(".ckpt") and n not in theirs)
    kept = ["previous/run-ep0-2.ckpt", "previous/run-ep1.ckpt", "previous/run-ep2-2.ckpt"]
    assert ours == [*(kept if keep_prev else []), "previous/run-ep3.ckpt", "run-ep4.ckpt"]


def test_folder_of_an_older_version__continued_and_nothing_of_it_deleted(tmp_path):
    cfg = run_cfg(tmp_path, **{"auto_resume.enabled": True})
    first = checkpointer_of(train(cfg, epochs=2)).last_ckpt
    (first.parent / "checkpoints.json").unlink()  # older versions had no record
    assert find_checkpoint(cfg) == first
    last = checkpointer_of(train(cfg, epochs=5, ckpt_path=first)).last_ckpt
    names = [n for n in files_in(first.parent) if n.endswith(".ckpt")]
    new = ["previous/run-ep3.ckpt", "run-ep4.ckpt"]
    assert names == sorted(["previous/run-ep0.ckpt", "run-ep1.ckpt", *new])
    assert find_checkpoint(cfg) == last


def test_same_run_started_twice_at_once__second_is_told(tmp_path):
    cfg = run_cfg(tmp_path)
    told = []

    class StartAgain(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            command = [sys.executable, "-c", _START_AGAIN, str(tmp_path), small_runs.__file__]
            told.append(subprocess.run(command, capture_output=True, text=True))

    folder = checkpointer_of(train(cfg, epochs=1, callbacks=[StartAgain()])).path
    (second,) = told
    assert (
        f"RunInUseError: this run is already being trained in {folder} by process {os.getpid()} on"
        in (second.stderr)
    )
    assert len(list((tmp_path / "dino_vmf").iterdir())) == 1
    command = [sys.executable, "-c", _START_AGAIN, str(tmp_path), small_runs.__file__]
    assert subprocess.run(command, capture_output=True).returncode == 0  # now it may


_START_AGAIN = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("again", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.train(module.run_cfg(pathlib.Path(sys.argv[1])), epochs=1)
"""


def test_unwritable_folder__named_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError, match=r"checkpoint\.dir=.*file cannot be written"):
        train(run_cfg(blocked))


@pytest.mark.skipif(
    host.GENERATION != "main", reason="1.0.2's main_pretrain.py has another Trainer"
)
def test_hosts_checkpointer__is_replaced_not_doubled(tmp_path):
    """The host's main_pretrain.py passes its own: Lightning lets a subclass take its place."""
    from solo.utils.checkpointer import Checkpointer as HostCheckpointer

    cfg = run_cfg(tmp_path)
    theirs = HostCheckpointer(copy.deepcopy(cfg), logdir=str(tmp_path / "host"), frequency=1)
    trainer = train(cfg, epochs=1, callbacks=[theirs])
    assert [type(c) for c in trainer.callbacks if isinstance(c, HostCheckpointer)] == [Checkpointer]
    assert not (tmp_path / "host").exists()
