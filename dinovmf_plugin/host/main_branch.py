"""solo-learn main (GitHub): its API is the one the methods are written to."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from solo.methods import METHODS
from solo.methods.base import BaseMomentumMethod as _BaseMomentumMethod

# Lightning lets a callback of the model replace the Trainer's only if it is a subclass of it
from solo.utils.checkpointer import Checkpointer as HostCheckpointer

from dinovmf_plugin.host.backbones import register_in_main
from dinovmf_plugin.host.knn import repair_knn

__all__ = ["BACKBONES", "BaseMomentumMethod", "HostCheckpointer", "build_host_method"]

repair_knn()
register_in_main()
BACKBONES = tuple(sorted(_BaseMomentumMethod._BACKBONES))
"""Names that ``backbone.name`` may have."""


class BaseMomentumMethod(_BaseMomentumMethod):
    """The host's base class, unchanged but for one default it lacks.

    Differs from upstream: a config without a ``momentum`` node gets the defaults instead of an
    attribute error.
    """

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in the host's defaults (see solo-learn)."""
        if cfg.get("momentum") is None:
            cfg.momentum = {}
        return _BaseMomentumMethod.add_and_assert_specific_cfg(cfg)


def build_host_method(cfg: DictConfig) -> Any:
    """Build one of the host's own methods from a config."""
    return METHODS[cfg.method](cfg)
