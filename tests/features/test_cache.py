import os
from dataclasses import replace

import pytest
import torch

from dinovmf_plugin.features.cache import FeatureKey, load_feature_file, save_feature_file

KEY = FeatureKey("sha256 abc teacher", "listing", "resize 256", "CLS, after the final norm")


@pytest.fixture
def features():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(5)


def test_round_trip(tmp_path, features):
    path = tmp_path / "new" / KEY.file_name("train")
    save_feature_file(path, *features, KEY)
    found, labels = load_feature_file(path, KEY)
    assert torch.equal(found, features[0])
    assert torch.equal(labels, features[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left
    assert path.stat().st_mode & 0o777 == 0o644


def test_half_precision_is_half_as_large_and_read_as_float32(tmp_path, features):
    big = (torch.randn(500, 30), torch.arange(500))
    save_feature_file(tmp_path / "a", *big, KEY)
    save_feature_file(tmp_path / "b", *big, KEY, torch.float16)
    found, _ = load_feature_file(tmp_path / "b", KEY)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, big[0].half().float())
    assert (tmp_path / "b").stat().st_size < 0.6 * (tmp_path / "a").stat().st_size


@pytest.mark.parametrize("field", ["backbone", "images", "transform", "feature", "precision"])
def test_every_field_makes_another_file_and_a_mismatch_is_named(tmp_path, features, field):
    other = replace(KEY, **{field: "something else"})
    assert other.file_name("train") != KEY.file_name("train")
    path = tmp_path / "features"
    save_feature_file(path, *features, KEY)
    with pytest.raises(ValueError, match=f"made with something else .*{field}: .*wanted is 'some"):
        load_feature_file(path, other)


def test_what_is_no_feature_file(tmp_path, features):
    with pytest.raises(FileNotFoundError, match="there is no feature file"):
        load_feature_file(tmp_path / "none", KEY)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is broken or no feature file"):
        load_feature_file(tmp_path / "text", KEY)
    from safetensors.torch import save_file

    save_file({"x": features[0]}, tmp_path / "other")
    with pytest.raises(ValueError, match="is no feature file of this project"):
        load_feature_file(tmp_path / "other", KEY)
    save_feature_file(tmp_path / "cut", *features, KEY)
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="is broken"):
        load_feature_file(tmp_path / "cut", KEY)


def test_nan_and_overflow_are_refused(tmp_path, features):
    values, labels = features
    values[3, 1] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        save_feature_file(tmp_path / "nan", values, labels, KEY)
    values[3, 1] = 1e6
    with pytest.raises(ValueError, match="float16 features hold a NaN or infinity"):
        save_feature_file(tmp_path / "large", values, labels, KEY, torch.float16)
    assert not list(tmp_path.iterdir())


def test_full_disk__one_sentence_with_the_name_and_nothing_left_behind(
    tmp_path, features, monkeypatch
):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "train.safetensors"
    with pytest.raises(OSError, match=r"train\.safetensors cannot be written: No space left"):
        save_feature_file(path, *features, KEY)
    assert list(tmp_path.iterdir()) == []
