"""DAVIS-2017 video segmentation with frozen features; see configs/video_segmentation.yaml.

Example::

    python scripts/video_segmentation.py checkpoint=last.ckpt data_path=DAVIS output_dir=results/davis
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(
    version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="video_segmentation"
)
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Run the evaluation, write its results and print the scores."""
    from dinovmf_plugin.evaluation.video.page import format_table
    from dinovmf_plugin.evaluation.video.run import evaluate_video_segmentation
    from dinovmf_plugin.evaluation.video.settings import VideoSettings
    from dinovmf_plugin.runs.settings import read

    settings = read(VideoSettings, cfg)
    print(format_table(evaluate_video_segmentation(settings)))
    print(f"{settings.output_dir}/results.json, {settings.output_dir}/report.html")


if __name__ == "__main__":
    main()
