"""The tiny network and the images of the analyses, and settings for them."""

from __future__ import annotations

import pytest

from dinovmf_plugin.embeddings.settings import EmbedSettings
from dinovmf_plugin.runs.settings import read
from tests.analysis.conftest import image_folders, networks, plugin_checkpoint

__all__ = ["image_folders", "networks", "plugin_checkpoint"]


@pytest.fixture
def settings(plugin_checkpoint, image_folders, tmp_path):
    """Factory: ``settings(format="npy", data={"batch_size": 3})`` for the 12 images of ``train/``."""

    def make(**changes):
        data = {"path": image_folders / "train", "num_workers": 0, "batch_size": 2}
        given = {
            "checkpoint": plugin_checkpoint,
            "output_dir": tmp_path / "out",
            "part": 4,
            "device": "cpu",
            "progress": False,
        }
        return read(EmbedSettings, given | changes | {"data": data | changes.get("data", {})})

    return make
