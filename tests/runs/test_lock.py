"""The lock of a run: told who holds it, gone with the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinovmf_plugin.runs import lock
from dinovmf_plugin.runs.lock import RunInUseError, RunLock, is_first_process, release_locks

_FORK = multiprocessing.get_context("fork")


def _hold(folder: Path, ready, with_child: bool = False) -> None:
    lock = RunLock(folder)
    lock.acquire()
    if with_child and os.fork() == 0:  # as a loader process: it outlives its parent for a while
        time.sleep(4)
        os._exit(0)
    ready.set()
    signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Factory of a process that holds the lock; killed in the end."""
    started = []

    def start(**options):
        ready = _FORK.Event()
        process = _FORK.Process(target=_hold, args=(tmp_path, ready), kwargs=options)
        process.start()
        started.append(process)
        assert ready.wait(30)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_second_process__told_who_and_since_when(tmp_path, holder):
    process = holder()
    with pytest.raises(RunInUseError) as caught:
        RunLock(tmp_path).acquire()
    message = str(caught.value)
    assert f"{tmp_path} by process {process.pid} on {socket.gethostname()}, since 20" in message
    assert "\n" not in message


@pytest.mark.parametrize("with_child", [False, True])
def test_killed_process__leaves_no_lock_behind(tmp_path, holder, with_child):
    process = holder(with_child=with_child)
    process.kill()
    process.join()
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()
    assert not (tmp_path / "running.json").exists()


def test_same_process__may_take_it_again_and_releases_as_often(tmp_path):
    locks = [RunLock(tmp_path), RunLock(tmp_path / ".." / tmp_path.name)]
    for one in locks:
        one.acquire()
    locks[0].release()
    assert _taken_elsewhere(tmp_path)
    locks[1].release()
    assert not _taken_elsewhere(tmp_path)
    locks[1].release()  # nothing to give back


def _taken_elsewhere(folder: Path) -> bool:
    code = "import sys, pathlib; from dinovmf_plugin.runs.lock import RunLock; "
    code += "RunLock(pathlib.Path(sys.argv[1])).acquire()"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0 or "RunInUseError: this run is already" in done.stderr
    return done.returncode != 0


def test_release_locks__however_often_taken(tmp_path):
    for _ in range(2):
        RunLock(tmp_path).acquire()
    release_locks()
    assert not _taken_elsewhere(tmp_path)


def test_holder_without_a_name__one_sentence_still(tmp_path, holder, monkeypatch):
    holder()
    (tmp_path / "running.json").unlink()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    with pytest.raises(RunInUseError, match="by another process: wait for it"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_is_first_process(monkeypatch, name):
    for other in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    assert is_first_process()
    monkeypatch.setenv(name, "0")
    assert is_first_process()
    monkeypatch.setenv(name, "1")
    assert not is_first_process()
