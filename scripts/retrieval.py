"""Image retrieval on revisited Oxford and Paris; see configs/retrieval.yaml.

Example::

    python scripts/retrieval.py checkpoint=last.ckpt data_path=datasets output_dir=results/roxford
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.evaluation.retrieval_run import (
    RetrievalSettings,
    evaluate_retrieval,
    format_scores,
)


@hydra.main(config_path="pkg://dinovmf_plugin.configs", config_name="retrieval", version_base="1.2")
def main(cfg: DictConfig) -> None:
    """Evaluate and print the scores."""
    settings = RetrievalSettings(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    print(format_scores(evaluate_retrieval(settings)))


if __name__ == "__main__":
    main()
