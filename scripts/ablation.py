"""The ablation of Table 1; see configs/ablation.yaml.

Example::

    python scripts/ablation.py output_dir=ablation "seeds=[0,1,2]"
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.comparison.sweep import register_resolver, run_job

register_resolver()


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="ablation")
def main(cfg: DictConfig) -> None:
    """Run one job of the sweep; checks and tables are the callback's."""
    run_job(cfg, "ablation")


if __name__ == "__main__":
    main()
