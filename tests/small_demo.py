"""The demo's recipe, small enough for a test: four images a batch, 32 prototypes, a quiet Trainer."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_module

__all__ = ["SMALL", "small_demo"]

SMALL = (
    "data.format=image_folder",
    "data.num_workers=0",
    "optimizer.batch_size=4",
    "method_kwargs.num_prototypes=32",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=8",
    "+enable_progress_bar=False",
    "+enable_model_summary=False",
)


def small_demo(*overrides: str) -> Any:
    """Compose ``demo_recipe`` with ``SMALL`` and further overrides; the last one of a key counts."""
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return compose("demo_recipe", overrides=[*SMALL, *overrides])
