"""Demonstration on real photographs: ``python scripts/demo.py output_dir=demo``."""

from __future__ import annotations

import os

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message

# Small operations by two threads: threads that spin while they wait take the cores from DALI's and from
# whatever else runs (a step took 2.9 s instead of 0.5 s on a busy machine). Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="demo")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run ``dinovmf_plugin.demo.run.run_demo``."""
    from dinovmf_plugin.demo.run import run_demo

    run_demo(cfg)


if __name__ == "__main__":
    main()
