"""Pre-train: ``python scripts/main_pretrain.py --config-name custom/dino_vmf data.train_path=DIR``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(
    version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="custom/dino_vmf"
)
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run ``dinovmf_plugin.pretraining.pretrain``."""
    from dinovmf_plugin.pretraining import pretrain

    pretrain(cfg)


if __name__ == "__main__":
    main()
