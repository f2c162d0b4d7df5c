"""What the tests of the methods share."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig


@pytest.fixture
def small_cfg(tiny_cfg) -> Any:
    """``tiny_cfg`` of any method, with patches of 8 px: 16 in a large crop."""

    def make(method: str, **overrides: Any) -> DictConfig:
        cfg = tiny_cfg(method, **{"backbone.kwargs.patch_size": 8}, **overrides)
        if method.startswith("msn"):
            del cfg.method_kwargs["freeze_last_layer"]
        return cfg

    return make
