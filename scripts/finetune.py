r"""Fine-tune a network with labels; see configs/finetune.yaml.

Example::

    python scripts/finetune.py checkpoint=last.ckpt evaluation/recipe=deit \
        finetune.dataset=cifar10 finetune.root=DATASETS output_dir=results
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="finetune")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Fine-tune and write the results."""
    from dinovmf_plugin.evaluation.finetuning.run import finetune

    finetune(cfg)


if __name__ == "__main__":
    main()
