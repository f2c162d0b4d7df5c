"""Embeddings see the pixels of training, and the center in its units, as the checkpoint tells."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from dinovmf_plugin.analysis.run import AnalysisSettings, analyze
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.features.embedding import embed
from dinovmf_plugin.features.images import image_folder
from dinovmf_plugin.features.mixture import make_mixture
from dinovmf_plugin.features.network import load_network
from dinovmf_plugin.mixture.model import prototype_mixture
from dinovmf_plugin.runs.settings import read

CROP = CenterCrop(resize=18, size=16)


def _changed(plugin_checkpoint, folder, **changes):
    """The plugin's checkpoint with another stored config."""
    content = torch.load(plugin_checkpoint, weights_only=True)
    cfg = content["dinovmf_plugin"]["cfg"]
    cfg["method_kwargs"] |= changes.pop("method_kwargs", {})
    cfg |= changes
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_weights_center__of_a_center_of_raw_scores(plugin_checkpoint, tmp_path):
    kwargs = {"centering": "logit", "center_raw_scores": True}
    model = load_network(_changed(plugin_checkpoint, tmp_path, method_kwargs=kwargs), head=True)
    center = make_mixture(model, "center").log_weights
    torch.testing.assert_close(center, (torch.linspace(-5, 0, 24).double() / 0.05).log_softmax(0))


def test_images__are_normalized_as_in_training(plugin_checkpoint, image_folders, tmp_path):
    path = _changed(plugin_checkpoint, tmp_path, data={"dataset": "cifar10"})
    given = {
        "checkpoint": str(path),
        "output_dir": str(tmp_path / "out"),
        "compare": {"ImageNet": str(plugin_checkpoint)},
        "data": {"train_path": str(image_folders / "flat"), "num_workers": 0},
        "attention": {"images": 1},
        "device": "cpu",
    }
    result = analyze(read(AnalysisSettings, given))
    cifar = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    assert (result["mean"], result["std"]) == cifar
    assert result["comparison"]["ImageNet"]["mean"] == (0.485, 0.456, 0.406)
    # against the same network on pixels that were normalized by hand
    model = load_network(path, head=True)
    pixels = torch.stack(
        [
            CenterCrop(18, 16, "bicubic", *cifar)(Image.open(file).convert("RGB"))
            for file in sorted((image_folders / "flat").iterdir())
        ]
    )
    with torch.no_grad():
        y = model.head(model.vit(pixels))
    likelihood = prototype_mixture(model.prototypes, 0.05).log_likelihood(y).mean()
    assert result["mixture"]["train"]["log_likelihood"] == pytest.approx(
        float(likelihood), abs=1e-4
    )


def test_an_embedding_that_is_not_finite__is_named_without_a_bar_too(
    plugin_checkpoint, image_folders, monkeypatch
):
    model = load_network(plugin_checkpoint, head=True)
    images = image_folder(image_folders / "train", "data.train_path", labeled="auto")
    calls, real = [], model.head.forward

    def broken(cls):
        calls.append(len(cls))
        y = real(cls)
        return y.index_fill(0, torch.tensor([1]), torch.nan) if len(calls) == 2 else y

    monkeypatch.setattr(model.head, "forward", broken)
    name = re.escape(images.path(5))
    with pytest.raises(ValueError, match=f"the embedding of {name} is NaN"):
        embed(model, images, CROP, batch_size=4, num_workers=0, progress=False)
