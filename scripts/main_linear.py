r"""Linear probes on frozen features; see configs/linear.yaml.

Example::

    python scripts/main_linear.py checkpoint=last.ckpt data.train_path=DIR data.val_path=DIR \
        output_dir=results
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="linear")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run the evaluation and write its results."""
    from dinovmf_plugin.evaluation.runner import evaluate_one

    evaluate_one(cfg, "linear")


if __name__ == "__main__":
    main()
