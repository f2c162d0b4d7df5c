"""``auto_umap`` in the plugin's own script: what is drawn, where, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from dinovmf_plugin.data.module import validation_loader
from dinovmf_plugin.pretraining import pretrain
from dinovmf_plugin.training import umap as auto_umap
from dinovmf_plugin.training.config import parse_cfg
from tests.small_demo import small_demo


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 9)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def _recipe(pictures: Path, folder: Path, *overrides: str) -> Any:
    given = [
        f"data.train_path={pictures / 'train'}",
        f"data.val_path={pictures / 'val'}",
        f"checkpoint.dir={folder}",
        "check_val_every_n_epoch=1",
        "max_epochs=2",
    ]
    return small_demo(*given, *overrides)


class _Expected(Callback):
    """The student's features of the validation images, by the reader and the network alone."""

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.features = cfg, []

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # a DataLoader draws a number when it starts
    def on_validation_end(self, trainer: Any, module: Any) -> None:
        batches = [(module.backbone(x), y) for x, y in validation_loader(self.cfg)]
        self.features.append(torch.cat([f for f, _ in batches]).numpy())
        self.labels = torch.cat([y for _, y in batches]).tolist()


def test_pictures__of_the_students_features(pictures, tmp_path, monkeypatch):
    pytest.importorskip("umap")
    drawn: list[Any] = []
    embed, draw = auto_umap._embed, auto_umap._draw

    def keep_features(features: Any, seed: int) -> Any:
        drawn.append([features, embed(features, seed)])
        return drawn[-1][1]

    def keep_labels(points: Any, labels: Any) -> Any:
        drawn[-1].append(labels.tolist())
        return draw(points, labels)

    monkeypatch.setattr(auto_umap, "_embed", keep_features)
    monkeypatch.setattr(auto_umap, "_draw", keep_labels)
    umap_keys = ["+auto_umap.enabled=True", f"+auto_umap.dir={tmp_path / 'umap'}"]
    cfg = _recipe(pictures, tmp_path / "with", *umap_keys, "+auto_umap.frequency=2", "max_epochs=3")
    expected = _Expected(cfg)
    checkpoint = pretrain(cfg, [expected])
    assert checkpoint is not None
    names = sorted(p.relative_to(tmp_path / "umap") for p in tmp_path.rglob("*.pdf"))
    folder = Path("dino_vmf") / checkpoint.parent.name
    assert names == [folder / "demo-ep=0.pdf", folder / "demo-ep=2.pdf"]
    assert all((tmp_path / "umap" / name).read_bytes()[:5] == b"%PDF-" for name in names)
    assert len(drawn) == 2
    for (features, points, labels), epoch in zip(drawn, (0, 2), strict=True):
        np.testing.assert_allclose(features, expected.features[epoch], atol=1e-5)
        assert labels == expected.labels == [0] * 9 + [1] * 9
        assert points.shape == (18, 2)
        assert np.isfinite(points).all()


def test_run__the_same_with_and_without(pictures, tmp_path, monkeypatch):
    """But for what UMAP's compiled code does to rounding, which is left out here."""
    monkeypatch.setattr(auto_umap, "_embed", lambda features, seed: features[:, :2])
    keys = ["+auto_umap.enabled=True", f"+auto_umap.dir={tmp_path / 'umap'}"]
    drawn = pretrain(_recipe(pictures, tmp_path / "with", *keys))
    plain = pretrain(_recipe(pictures, tmp_path / "without"))
    assert drawn is not None
    assert plain is not None
    assert len(list((tmp_path / "umap").rglob("*.pdf"))) == 2
    assert plain.parent.name == drawn.parent.name
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (drawn, plain))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("override", ["data.val_path=null", "data.no_labels=True"])
def test_nothing_to_draw__one_sentence(pictures, tmp_path, override):
    cfg = _recipe(pictures, tmp_path, "+auto_umap.enabled=True", override)
    with pytest.raises(
        ValueError, match=r"auto_umap\.enabled=True draws labeled .* data\.val_path"
    ):
        parse_cfg(cfg)


def test_umap_learn_missing__one_sentence(pictures, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "umap" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"needs umap-learn, .*: pip install umap-learn, or set"):
        parse_cfg(_recipe(pictures, tmp_path, "+auto_umap.enabled=True"))
    parse_cfg(_recipe(pictures, tmp_path, "+auto_umap.enabled=False"))
