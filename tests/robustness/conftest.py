"""Whole training runs in processes of their own, which may be killed, signalled, starved and watched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_demo import SMALL

ROOT = Path(__file__).resolve().parents[2]

# Importing torch, Lightning and solo-learn costs seconds: done once, then every run is a fork.
_SERVER = """
import json, os, sys
import lightning.pytorch, hydra
from dinovmf_plugin import host, pretraining, registry
from dinovmf_plugin.training import monitor as callback
from dinovmf_plugin.methods import dino, ibot, msn
from dinovmf_plugin.scripts import main_pretrain
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job["log"] + name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["env"])
        sys.argv = ["main_pretrain", *job["arguments"]]
        exec(job["prelude"], {})
        main_pretrain.main()
        sys.exit(0)  # as a process of its own would
    print(json.dumps(child), flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status), flush=True)
"""


@dataclasses.dataclass
class Ended:
    """How a run ended: ``status`` is minus the signal for a killed one."""

    status: int
    out: str
    err: str

    def message(self) -> str:
        """The one sentence of a run that refused or gave up; there must be no traceback beside it."""
        assert "Traceback" not in self.out + self.err, self.out + self.err
        (line,) = [x for x in self.err.splitlines() if x.startswith("error: ")]
        return line.removeprefix("error: ")


class Run:
    """One running ``main_pretrain``."""

    def __init__(self, server: subprocess.Popen[str], pid: int, log: str) -> None:
        self._server, self.pid, self._log = server, pid, log

    def wait_until(self, condition: Callable[[], Any], timeout: float = 240) -> None:
        """Wait for something to happen; fails if the run takes too long."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self._text("out") + self._text("err")
            time.sleep(0.005)

    def signal(self, number: int, group: bool = False) -> None:
        """Signal the process, or all processes of its session as SLURM and a terminal do."""
        with contextlib.suppress(ProcessLookupError):  # it may have been quicker
            (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, loader workers included."""
        self.signal(signal.SIGKILL, group=True)

    def out(self) -> str:
        """What it has printed so far."""
        return self._text("out")

    def _text(self, name: str) -> str:
        path = Path(self._log + name)
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self) -> Ended:
        """Wait for the end."""
        assert self._server.stdout is not None
        status = json.loads(self._server.stdout.readline())
        self.signal(signal.SIGKILL, group=True)  # nothing is left behind
        return Ended(status, self._text("out"), self._text("err"))


class Runs:
    """Starts runs, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: str, prelude: str = "", env: dict[str, str] | None = None) -> Run:
        self.count += 1
        log = str(self.folder / f"run{self.count}.")
        job = {"arguments": arguments, "log": log, "prelude": prelude, "env": env or {}}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Run(self.server, json.loads(self.server.stdout.readline()), log)


@pytest.fixture(scope="session")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    assert runs.server.stdin is not None
    runs.server.stdin.close()
    runs.server.wait(timeout=240)


@pytest.fixture
def start(_runs: Runs) -> Any:
    """Factory: ``start(*hydra_arguments, prelude="code run before", env={})`` -> ``Run``."""
    return _runs.start


@pytest.fixture(scope="session")
def write_pictures() -> Any:
    """Factory of folders: twelve PNG files of noise in two classes, three steps of four."""

    def write(root: Path) -> Path:
        rng = np.random.default_rng(0)
        for index in range(12):
            folder = root / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        return root

    return write


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, write_pictures: Any) -> Path:
    """A folder of twelve pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def _arguments(pictures: Path, folder: Path, method: str, more: tuple[str, ...]) -> list[str]:
    arguments = [
        "--config-name=demo_recipe",
        f"method={method}",
        f"data.train_path={pictures}",
        f"checkpoint.dir={folder}",
        "auto_resume.enabled=True",
        *SMALL,  # workers only where they matter: their start takes most of such a run's time
        "max_epochs=6",
        "backbone.kwargs.drop_path_rate=0.2",
        "method_kwargs.final_weight_decay=0.4",
        "log_every_n_steps=1",
    ]
    if method.startswith("msn"):
        dinos = ("warmup_teacher_temperature", "warmup_teacher_temperature_epochs")
        arguments += [f"~method_kwargs.{key}" for key in dinos]
    else:
        arguments += ["method_kwargs.teacher_temperature=0.07"]
        arguments += ["method_kwargs.warmup_teacher_temperature_epochs=4"]
    return [*arguments, *more]


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> Any:
    """Factory of the arguments of a tiny run: ``recipe("msn", *more, folder="whole")``."""

    def make(method: str = "dino_vmf", *more: str, folder: str = "runs") -> list[str]:
        return _arguments(pictures, tmp_path / folder, method, more)

    return make


@pytest.fixture(scope="session")
def undisturbed(_runs: Runs, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Factory: the final checkpoint of the run ``recipe(method, *more)`` if nothing happens to it."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(method: str = "dino_vmf", *more: str) -> dict[str, Any]:
        key = (method, *more)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            ended = _runs.start(*_arguments(pictures, folder, method, more)).end()
            assert ended.status == 0, ended.err
            (path,) = folder.glob("*/*/*.ckpt")
            made[key] = torch.load(path, weights_only=True)
        return made[key]

    return run


@pytest.fixture
def checkpoints(tmp_path: Path) -> Any:
    """Names of the checkpoints below ``tmp_path/folder``, without the folder of the method and the run."""

    def names(folder: str = "runs", pattern: str = "*.ckpt") -> list[str]:
        root = tmp_path / folder
        return sorted("/".join(p.relative_to(root).parts[2:]) for p in root.rglob(pattern))

    return names


@pytest.fixture
def only_file(tmp_path: Path) -> Any:
    """The content of the one checkpoint that a finished run of ``folder`` has at its top."""

    def read(folder: str = "runs") -> dict[str, Any]:
        (path,) = (tmp_path / folder).glob("*/*/*.ckpt")
        return torch.load(path, weights_only=True)

    return read


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two checkpoints differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{path}: keys"]
        return [x for key in a for x in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: length"]
        return [
            x
            for i, (c, d) in enumerate(zip(a, b, strict=True))
            for x in differences(c, d, f"{path}/{i}")
        ]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


@pytest.fixture
def assert_same_run() -> Any:
    """Two final checkpoints hold the same weights, centers, optimizer, progress and loader position."""

    def check(a: dict[str, Any], b: dict[str, Any]) -> None:
        found = differences(a["state_dict"], b["state_dict"], "state_dict")
        found += differences(a["optimizer_states"], b["optimizer_states"], "optimizer")
        for key in ("epoch", "global_step"):
            found += differences(a[key], b[key], key)
        loaders = [x["loops"]["fit_loop"]["state_dict"]["combined_loader"] for x in (a, b)]
        found += differences(*loaders, "loader")
        assert not found, found[:10]

    return check
