"""A folder of images to a table of features, components and likelihoods; see configs/embed.yaml.

Example::

    python scripts/embed.py checkpoint=last.ckpt data.path=photos output_dir=results/embeddings
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dinovmf_plugin.runs.cli import one_clear_message


@hydra.main(version_base="1.2", config_path="pkg://dinovmf_plugin.configs", config_name="embed")
@one_clear_message
def main(cfg: DictConfig) -> None:
    """Write the table and say where it is."""
    from dinovmf_plugin.embeddings.run import embed_folder
    from dinovmf_plugin.embeddings.settings import EmbedSettings
    from dinovmf_plugin.runs.settings import read

    settings = read(EmbedSettings, cfg)
    result = embed_folder(settings)
    print(f"{result['rows']} images: {settings.output_dir}/table")


if __name__ == "__main__":
    main()
