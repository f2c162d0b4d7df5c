"""Disks, files and processes that fail while training: one sentence, and the checkpoint before stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from dinovmf_plugin.training.folders import is_whole

# from the third checkpoint on no file may become larger than 100 kB
FILE_TOO_LARGE = """
import resource, signal
from dinovmf_plugin.training.checkpointer import Checkpointer
tidy = Checkpointer._tidy
def limit(self, newest):
    tidy(self, newest)
    if newest.stem == "demo-ep1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
Checkpointer._tidy = limit
"""


def _check_last(message: str, reason: str, root: Path, names: list[str]) -> None:
    assert "demo-ep2.ckpt could not be written" in message
    assert reason in message
    assert "demo-ep1.ckpt is untouched" in message
    assert names == ["demo-ep1.ckpt", "previous/demo-ep0.ckpt"]
    assert all(is_whole(path) for path in root.rglob("*.ckpt"))
    assert not list(root.rglob("*.part"))


def test_file_size_limit__while_a_checkpoint_is_written(
    start, recipe, undisturbed, checkpoints, only_file, assert_same_run, tmp_path
):
    ended = start(*recipe(), prelude=FILE_TOO_LARGE).end()
    assert ended.status == 2
    _check_last(ended.message(), "File too large", tmp_path / "runs", checkpoints())
    # with room again, the run goes on to the same end
    assert start(*recipe()).end().status == 0
    assert_same_run(undisturbed(), only_file())


@contextlib.contextmanager
def _mounted(folder: Path, *options: str):
    """A mount of our own, where that is allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _size_of_a_checkpoint(start, recipe, tmp_path: Path) -> int:
    assert (
        start(*recipe("dino_vmf", "max_epochs=1", "scheduler.warmup_epochs=1", folder="size"))
        .end()
        .status
        == 0
    )
    (path,) = (tmp_path / "size").rglob("*.ckpt")
    return path.stat().st_size


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_disk__while_a_checkpoint_is_written(start, recipe, checkpoints, tmp_path):
    """A file system with room for two checkpoints, but not for the third beside them."""
    size = int(2.5 * _size_of_a_checkpoint(start, recipe, tmp_path))
    with _mounted(tmp_path / "runs", "-t", "tmpfs", "-o", f"size={size}", "none"):
        ended = start(*recipe()).end()
        assert ended.status == 2
        _check_last(ended.message(), "No space left on device", tmp_path / "runs", checkpoints())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_read_only_disk__named_before_training(start, recipe, tmp_path):
    target = tmp_path / "runs"
    target.mkdir()
    with _mounted(target, "--bind", "-o", "ro", str(target)):
        ended = start(*recipe()).end()
    assert ended.status == 2
    assert f"checkpoint.dir={target} cannot be written: Read-only file system" in ended.message()


def test_folder_without_permission__named_before_training(start, recipe, write_pictures, tmp_path):
    """Root may write anywhere: as root, the run gives its rights up first."""
    # what Python itself would import later may be root's alone: hydra looks for configs with it
    files = "from importlib import resources; resources.files('dinovmf_plugin.configs'); "
    give_up = files + "import os; os.setuid(65534)" if os.geteuid() == 0 else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "runs").mkdir()
        (folder / "runs").chmod(0o555)
        write_pictures(folder / "pictures")
        where = (f"data.train_path={folder / 'pictures'}", f"checkpoint.dir={folder / 'runs'}")
        ended = start(*recipe("dino_vmf", *where), prelude=give_up).end()
        (folder / "runs").chmod(0o755)
    assert ended.status == 2
    assert f"checkpoint.dir={folder / 'runs'} cannot be written: Permission" in ended.message()


@pytest.mark.parametrize(
    "more", [pytest.param(("data.num_workers=2",), marks=pytest.mark.slow), ("data.format=dali",)]
)
@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        pytest.param("emptied", marks=pytest.mark.slow),
        pytest.param("deleted", marks=pytest.mark.slow),
    ],
)
def test_image_damaged_after_the_check__named_and_nothing_lost(
    damage,
    more,
    start,
    recipe,
    undisturbed,
    pictures,
    checkpoints,
    only_file,
    assert_same_run,
    tmp_path,
):
    own = tmp_path / "pictures"
    shutil.copytree(pictures, own)
    victim = own / "b" / "05.png"
    content = victim.read_bytes()
    arguments = recipe("dino_vmf", *more, f"data.train_path={own}", "max_epochs=5")
    run = start(*arguments)
    run.wait_until(lambda: "demo-ep1.ckpt" in checkpoints())
    if damage == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    ended = run.end()
    assert ended.status == 2
    message = ended.message()
    assert f"cannot read the image '{victim}'" in message
    assert all(is_whole(path) for path in (tmp_path / "runs").rglob("*.ckpt"))
    assert len(checkpoints()) == 2

    victim.write_bytes(content)  # repaired: the run goes on to the end it would have had
    assert start(*arguments).end().status == 0
    assert_same_run(undisturbed("dino_vmf", *more, "max_epochs=5"), only_file())


TELL_WORKERS = """
import json, torch.utils.data.dataloader as module
kind = module._MultiProcessingDataLoaderIter
make = kind.__init__
def tell(self, *args, **kwargs):
    make(self, *args, **kwargs)
    print("workers", json.dumps([worker.pid for worker in self._workers]), flush=True)
kind.__init__ = tell
"""


def test_loader_worker_dies__named_and_nothing_lost(start, recipe, checkpoints, tmp_path):
    run = start(*recipe("dino_vmf", "max_epochs=500", "data.num_workers=2"), prelude=TELL_WORKERS)
    run.wait_until(lambda: "demo-ep1.ckpt" in checkpoints())
    worker = json.loads(run.out().split("workers ")[1].splitlines()[0])[0]
    os.kill(worker, signal.SIGKILL)
    ended = run.end()
    assert ended.status == 2
    message = ended.message()
    assert message.startswith("DataLoader worker (pid")
    assert str(worker) in message
    assert "lower data.num_workers" in message
    assert all(is_whole(path) for path in (tmp_path / "runs").rglob("*.ckpt"))
    assert len(checkpoints()) == 2


def test_newest_checkpoint_truncated__the_one_before_is_used(
    start, recipe, undisturbed, checkpoints, only_file, assert_same_run, tmp_path
):
    assert start(*recipe()).end().status == 0
    (newest,) = (tmp_path / "runs").glob("*/*/*.ckpt")
    os.truncate(newest, newest.stat().st_size * 3 // 4)
    again = start(*recipe()).end()
    assert again.status == 0, again.err
    assert f"checkpoint {newest} is truncated or damaged" in again.out
    assert "demo-ep4.ckpt" in again.out
    assert checkpoints() == ["demo-ep5.ckpt", "previous/demo-ep4.ckpt"]
    assert_same_run(undisturbed(), only_file())
