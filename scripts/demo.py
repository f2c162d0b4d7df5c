"""Demonstration on real photographs: ``python scripts/demo.py output_dir=demo``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="demo")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run ``dinovmf_plugin.demo.run.run_demo``."""
    from dinovmf_plugin.demo.run import run_demo

    run_demo(cfg)


if __name__ == "__main__":
    main()
