"""Fixtures of the retrieval tests: a tiny set and the weights of a tiny ViT."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.retrieval.landmarks import vit, write_landmarks


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "sets" / "roxford5k"
    write_landmarks(folder)
    return folder
