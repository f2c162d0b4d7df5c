"""Linear transfer to small data sets; see configs/transfer.yaml.

Example::

    python scripts/transfer.py checkpoint=last.ckpt transfer.root=DATASETS output_dir=results
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="transfer")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run the evaluation and write its results."""
    from dinovmf_plugin.evaluation.runner import evaluate_one

    evaluate_one(cfg, "transfer")


if __name__ == "__main__":
    main()
