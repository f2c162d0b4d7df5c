"""One GPU for each parallel job on this machine, dealt through locks that end with their process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["lease_gpu"]

_leased: dict[str, tuple[int, IO[str]]] = {}


def lease_gpu(gpus: Sequence[int], folder: str | Path) -> int:
    """Take the first GPU that no other process has, and show this process no other.

    Sets ``CUDA_VISIBLE_DEVICES``, so it has to come before the process uses CUDA. The lease ends with
    the process; a further call in the same process returns the same GPU, since CUDA cannot change it.

    Args:
        gpus: numbers as ``nvidia-smi`` counts them.
        folder: on a disk of this machine or one that supports locks; holds one small file per GPU.

    Raises:
        ValueError: if all are taken, or the list is empty.
    """
    import fcntl

    key = str(Path(folder).resolve())
    if key in _leased:
        return _leased[key][0]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        handle = open(Path(folder) / f".gpu-{gpu}.lock", "w")  # noqa: SIM115  (held until exit)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            continue
        _leased[key] = (gpu, handle)
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        return gpu
    raise ValueError(
        f"gpus={list(gpus)}: all are taken by other jobs; start at most as many jobs in parallel "
        "(hydra.launcher.n_jobs)"
    )
