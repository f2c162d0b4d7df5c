"""What ``dinovmf embed`` wrote, in the hands of pandas, faiss and Hugging Face ``datasets``."""

from __future__ import annotations

import datasets
import faiss
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from dinovmf_plugin.__main__ import main
from dinovmf_plugin.embeddings.run import embed_folder
from dinovmf_plugin.embeddings.settings import EmbedSettings
from dinovmf_plugin.runs.reference import default_values


def _nearest(features: np.ndarray) -> np.ndarray:
    """The nearest other row by Euclidean distance, by hand."""
    distances = ((features[:, None].astype(float) - features[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def test_pandas_and_datasets__read_the_parts_as_one_table(settings, tmp_path):
    embed_folder(settings())
    table = tmp_path / "out" / "table"
    frame = pd.read_parquet(table)
    assert list(frame) == ["features", "component", "responsibility", "log_likelihood", "path"]
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(table), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["features"].length == 192
    assert loaded["path"][:] == frame["path"].tolist()
    assert loaded["component"][:] == frame["component"].tolist()
    features = np.stack(frame["features"])
    np.testing.assert_array_equal(np.array(loaded["features"][:], dtype=np.float32), features)
    loaded.add_faiss_index("features")
    for row, expected in enumerate(_nearest(features)):
        _, found = loaded.get_nearest_examples("features", features[row], k=2)
        assert found["path"][1] == frame["path"][expected]


def test_faiss__searches_the_array_as_it_is(settings, tmp_path):
    embed_folder(settings(format="npy"))
    features = np.load(tmp_path / "out" / "table" / "features.npy", mmap_mode="r")
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(features)
    _, found = index.search(np.asarray(features), 2)
    np.testing.assert_array_equal(found[:, 0], np.arange(12))
    np.testing.assert_array_equal(found[:, 1], _nearest(np.asarray(features)))


def test_config__has_the_defaults_of_the_class():
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        config = OmegaConf.to_container(compose("embed"))
    assert config == default_values(EmbedSettings)


def test_command__writes_and_says_where(
    plugin_checkpoint, image_folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "--help"]) == 0
    assert "part=16384  (a whole number of at least 1)" in capsys.readouterr().out
    given = [
        f"checkpoint={plugin_checkpoint}",
        f"data.path={image_folders / 'flat'}",
        "data.num_workers=0",
        "output_dir=out",
        "device=cpu",
    ]
    assert main(["embed", *given]) == 0
    written = capsys.readouterr()
    assert "3 images: out/table" in written.out
    assert "3/3" in written.err  # the bar,
    assert "img/s" in written.err  # with its rate
    assert pd.read_parquet("out/table")["path"].tolist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert main(["embed", *given]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["embed", *given, "part=100"])
    assert ended.value.code == 2
    assert "part=100 must be a multiple of data.batch_size=64" in capsys.readouterr().err
