"""Repair of the host's search for a checkpoint (``auto_resume.enabled`` of solo-learn main).

Upstream compares ten keys, neither ``method_kwargs`` nor the seed among them: two cells of an ablation
continue each other; and it stops at a folder of checkpoints without ``args.json``. For the plugin's methods
the plugin's own search answers; ``auto_resume.max_hours`` keeps its meaning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.host import GENERATION

__all__ = ["patch_auto_resume"]


def patch_auto_resume(
    methods: Collection[str], find: Callable[[DictConfig], tuple[Path | None, str | None]]
) -> None:
    """Let ``find`` look for the checkpoints of ``methods``; idempotent, nothing to do in 1.0.2.

    Args:
        methods: names that ``cfg.method`` may have.
        find: gives the checkpoint of exactly the run of a config, or None, and its id at wandb.
    """
    if GENERATION != "main":
        return
    from solo.utils.auto_resumer import AutoResumer

    if getattr(AutoResumer, "_dinovmf_repaired", False):
        return
    host_find = AutoResumer.find_checkpoint

    def find_checkpoint(self: Any, cfg: DictConfig) -> tuple[Any, str | None]:
        if cfg.method not in methods:
            return host_find(self, cfg)
        path, run_id = find(cfg)
        hours = OmegaConf.select(cfg, "auto_resume.max_hours")
        if path is None or hours is None or time.time() - path.stat().st_mtime < hours * 3600:
            return path, run_id
        print(f"{path} is older than auto_resume.max_hours={hours}: starting afresh")
        return None, None

    AutoResumer.find_checkpoint = find_checkpoint
    AutoResumer._dinovmf_repaired = True
