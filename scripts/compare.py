"""Methods compared over seeds, and their stability; see configs/compare.yaml.

Example::

    python scripts/compare.py output_dir=compare "methods=[dino_multicrop,dino_vmf]" "seeds=[0,1,2]"
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.comparison.sweep import register_resolver, run_job

register_resolver()


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Run one job of the sweep; checks and tables are the callback's."""
    run_job(cfg, "compare")


if __name__ == "__main__":
    main()
