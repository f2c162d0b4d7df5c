"""Image retrieval on revisited Oxford and Paris; see configs/retrieval.yaml.

Example::

    python scripts/retrieval.py checkpoint=last.ckpt data_path=datasets output_dir=results/roxford
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="retrieval")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run the evaluation, write its results and print the scores."""
    from dinovmf_plugin.evaluation.retrieval.page import format_scores
    from dinovmf_plugin.evaluation.retrieval.run import evaluate_retrieval
    from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
    from dinovmf_plugin.runs.settings import read

    settings = read(RetrievalSettings, cfg)
    print(format_scores(evaluate_retrieval(settings)))
    print(f"{settings.output_dir}/results.json, {settings.output_dir}/report.html")


if __name__ == "__main__":
    main()
