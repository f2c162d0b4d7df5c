"""Analyses of a trained mixture; see configs/analyze.yaml.

Example::

    python scripts/analyze.py checkpoint=last.ckpt data.train_path=photos output_dir=results/analysis
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(config_path="pkg://dinovmf_plugin.configs", config_name="analyze", version_base="1.2")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Analyze and print the numbers of Table 4."""
    from dinovmf_plugin.analysis.run import AnalysisSettings, analyze, format_analysis
    from dinovmf_plugin.runs.settings import read

    print(format_analysis(analyze(read(AnalysisSettings, cfg))))


if __name__ == "__main__":
    main()
