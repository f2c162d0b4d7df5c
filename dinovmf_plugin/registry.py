"""Names -> method classes, and their registration with solo-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["method_classes", "register"]


def method_classes() -> dict[str, type[Any]]:
    """The plugin's methods by the name that a config selects."""
    from dinovmf_plugin.methods.dino import DINOMultiCrop, DINOvMF
    from dinovmf_plugin.methods.ibot import IBOT, IBOTvMF
    from dinovmf_plugin.methods.msn import MSN, MSNvMF

    return {
        "dino_multicrop": DINOMultiCrop,
        "dino_vmf": DINOvMF,
        "ibot": IBOT,
        "ibot_vmf": IBOTvMF,
        "msn": MSN,
        "msn_vmf": MSNvMF,
    }


def _find_run(cfg: Any) -> tuple[Path | None, str | None]:
    """The newest whole checkpoint of exactly this run and its id at wandb; None where there is none."""
    from dinovmf_plugin.training.folders import choose_folder, find_checkpoint
    from dinovmf_plugin.training.loggers import stored_run_ids

    path = find_checkpoint(cfg)
    return path, stored_run_ids(choose_folder(cfg, path)).get("wandb")


def register() -> list[str]:
    """Put the plugin's methods into ``solo.methods.METHODS``; calling it again changes nothing.

    Returns:
        The registered names.

    Raises:
        ImportError: if solo-learn is not installed.
        ValueError: if a name already belongs to a class that is not the plugin's.
    """
    from dinovmf_plugin import host
    from dinovmf_plugin.host.data import patch_data
    from dinovmf_plugin.host.resuming import patch_auto_resume

    classes = method_classes()
    for name in classes:
        owner = host.METHODS.get(name)
        if owner is not None and not owner.__module__.startswith("dinovmf_plugin."):
            raise ValueError(
                f"method={name!r} is already registered by {owner.__module__}.{owner.__qualname__}: "
                "rename one of the two"
            )
    host.METHODS.update(classes)
    patch_data()
    patch_auto_resume(tuple(classes), _find_run)
    return sorted(classes)
