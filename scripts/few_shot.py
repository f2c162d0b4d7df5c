r"""Few-shot accuracy of frozen features; see configs/few_shot.yaml.

Example::

    python scripts/few_shot.py checkpoint=last.ckpt data.train_path=DIR data.val_path=DIR \
        output_dir=results
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="few_shot")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run the evaluation and write its results."""
    from dinovmf_plugin.evaluation.runner import evaluate_one

    evaluate_one(cfg, "few_shot")


if __name__ == "__main__":
    main()
