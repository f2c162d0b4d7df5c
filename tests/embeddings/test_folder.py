"""``dinovmf embed``: the rows are right, whole after every kill, bound to what made them; few are held."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from PIL import Image

from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.embeddings.run import embed_folder
from dinovmf_plugin.embeddings.scores import Embedder
from dinovmf_plugin.runs.lock import RunInUseError, RunLock

FORMATS = ("parquet", "npy", "safetensors")
_FORK = multiprocessing.get_context("fork")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "table").glob("[!.]*"))}


def _rows(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The table, read by the public library of its kind."""
    table = folder / "table"
    if kind == "parquet":
        frame = pd.read_parquet(table)
        columns = {name: frame[name].to_numpy() for name in frame}
        return columns | {"features": np.stack(columns["features"])}
    if kind == "npy":
        columns = {path.stem: np.load(path) for path in table.glob("*.npy")}
        return columns | {"path": np.char.decode(columns["path"])}
    parts = []
    for path in sorted(table.glob("*.safetensors")):
        with safetensors.safe_open(path, "np") as file:
            part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            parts.append(
                part | {"path": np.array(json.loads(file.metadata()["dinovmf_plugin"])["path"])}
            )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _by_hand(networks, root: Path) -> dict[str, np.ndarray]:
    """The paper's mixture in double precision: log-sum-exp of log C_p + kappa <mu, y>, equal weights."""
    vit, head = networks
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    crop = CenterCrop(resize=18, size=16)
    pixels = torch.stack([crop(Image.open(root / path).convert("RGB")) for path in paths])
    with torch.no_grad():
        features = vit(pixels)
        y = head(features).double().numpy()
        w = head.last_layer.weight().double().numpy()
    from scipy.special import ive, logsumexp

    p = w.shape[1]
    kappa = np.linalg.norm(w, axis=1) / 0.05
    log_bessel = np.log(ive(p / 2 - 1, kappa)) + kappa
    log_c = (p / 2 - 1) * np.log(kappa) - p / 2 * np.log(2 * np.pi) - log_bessel
    joint = y @ w.T / 0.05 + log_c - np.log(len(w))
    total = logsumexp(joint, axis=1)
    return {
        "path": np.array(paths),
        "features": features.numpy(),
        "component": joint.argmax(axis=1),
        "responsibility": np.exp(joint.max(axis=1) - total),
        "log_likelihood": total,
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_rows__are_the_papers_mixture(kind, settings, networks, image_folders, tmp_path):
    result = embed_folder(settings(format=kind))
    expected = _by_hand(networks, image_folders / "train")
    found = _rows(tmp_path / "out", kind)
    assert found.keys() == expected.keys()
    assert found["path"].tolist() == expected["path"].tolist()
    np.testing.assert_array_equal(found["component"], expected["component"])
    for name in ("features", "responsibility", "log_likelihood"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert found["features"].dtype == np.float32
    assert found["log_likelihood"].dtype == np.float64
    assert result["rows"] == 12
    assert {Path(name).name for name in result["files"]} == set(_content(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text()) == result


def test_without_a_mixture__features_alone(settings, tmp_path):
    embed_folder(settings(checkpoint="pixels", mixture=False, data={"crop_size": 16}))
    found = _rows(tmp_path / "out", "parquet")
    assert found.keys() == {"features", "path"}
    assert found["features"].shape == (12, 3 * 32 * 32)


def test_features_of_another_kind__do_not_touch_the_mixture(settings, tmp_path, networks):
    embed_folder(settings(format="npy"))
    other = tmp_path / "other"
    embed_folder(settings(format="npy", feature="cls_pre_norm", output_dir=other))
    cls, raw = _rows(tmp_path / "out", "npy"), _rows(other, "npy")
    with torch.no_grad():
        normed = networks[0].norm(torch.from_numpy(raw["features"])).numpy()
    np.testing.assert_allclose(cls["features"], normed, atol=1e-5)
    np.testing.assert_array_equal(cls["log_likelihood"], raw["log_likelihood"])


def _dies(settings, where: str, call: int) -> None:
    """In a process of its own: killed at the ``call``-th call of a function."""
    owner: Any = Embedder if where == "Embedder.score" else os
    name = where.rsplit(".", 1)[-1]
    real, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, function)
    embed_folder(settings)


# 12 images in batches of 2 and parts of 4, then the same folder finished by another start
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("where", "calls"),
    [("Embedder.score", (1, 4, 6)), ("os.fsync", (2, 4, 5)), ("os.replace", (2, 3, 4))],
)
def test_killed_at_any_moment__the_same_bytes(kind, where, calls, settings, tmp_path):
    embed_folder(settings(format=kind, output_dir=tmp_path / "whole"))
    for call in calls:
        given = settings(format=kind, output_dir=tmp_path / f"killed{call}")
        process = _FORK.Process(target=_dies, args=(given, where, call))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / f"killed{call}" / "embeddings.json").exists()
        embed_folder(given)
        assert _content(tmp_path / f"killed{call}") == _content(tmp_path / "whole")
        left = {path.name for path in (tmp_path / f"killed{call}" / "table").glob(".*")}
        assert left <= {".rows.json"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_start__repeats_only_the_part_that_was_not_whole(
    kind, settings, monkeypatch, tmp_path
):
    seen: list[int] = []
    real = Embedder.score

    def score(self, pixels, name_of):
        seen.append(len(pixels))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(self, pixels, name_of)

    monkeypatch.setattr(Embedder, "score", score)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(settings(format=kind))
    assert embed_folder(settings(format=kind))["rows_of_this_start"] == 8
    assert sum(seen[4:]) == 8
    count = len(seen)
    embed_folder(settings(format=kind))  # finished: nothing is computed
    assert len(seen) == count


def test_memory__does_not_grow_with_the_folder(settings, image_folders, monkeypatch, tmp_path):
    """Rows that are alive at any time, counted by weak references to their tensors."""
    alive: dict[int, int] = {}
    peaks = []
    real = Embedder.score

    def score(self, pixels, name_of):
        found = real(self, pixels, name_of)
        alive[id(found.features)] = len(pixels)
        weakref.finalize(found.features, alive.pop, id(found.features))
        peak.append(sum(alive.values()))
        return found

    monkeypatch.setattr(Embedder, "score", score)
    for copies in (1, 5):
        folder = tmp_path / f"images{copies}"
        for copy in range(copies):
            shutil.copytree(image_folders / "train", folder / str(copy))
        peak: list[int] = []
        given = settings(data={"path": folder}, output_dir=tmp_path / f"out{copies}")
        assert embed_folder(given)["rows"] == 12 * copies
        peaks.append(max(peak))
    assert peaks == [4, 4]  # the part


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("network", "network was 'sha256"),
        ("images", "images was "),
        ("feature", "feature was 'cls', is now 'dino'"),
        ("part", "part was 4, is now 6"),
    ],
)
def test_a_folder_of_something_else__is_refused_by_name(
    change, word, settings, image_folders, plugin_checkpoint, tmp_path
):
    photos = tmp_path / "photos"
    shutil.copytree(image_folders / "train", photos)
    embed_folder(settings(data={"path": photos}))
    before = _content(tmp_path / "out")
    changes = {}
    if change == "network":
        content = torch.load(plugin_checkpoint, weights_only=True)
        content["state_dict"]["momentum_backbone.cls_token"] += 1
        changes["checkpoint"] = tmp_path / "other.ckpt"
        torch.save(content, changes["checkpoint"])
    elif change == "images":
        os.utime(photos / "red" / "0.png", ns=(1, 1))
    else:
        changes = {"feature": {"feature": "dino"}, "part": {"part": 6}}[change]
    with pytest.raises(ValueError, match=word):
        embed_folder(settings(data={"path": photos}, **changes))
    assert _content(tmp_path / "out") == before


def test_another_process__is_told(settings, tmp_path):
    embed_folder(settings())

    def hold(ready):
        held = RunLock(tmp_path / "out")
        held.acquire()
        ready.set()
        signal.pause()

    ready = _FORK.Event()
    process = _FORK.Process(target=hold, args=(ready,))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(RunInUseError, match="already being written in"):
            embed_folder(settings())
    finally:
        process.kill()
        process.join()


def test_an_image_that_breaks_later__is_one_sentence(settings, tmp_path, image_folders):
    photos = tmp_path / "photos"
    shutil.copytree(image_folders / "train", photos)
    (photos / "red" / "3.png").write_bytes(b"no picture")
    given = {"path": photos, "check_images": "none", "num_workers": 1}
    with pytest.raises(RuntimeError, match=r"^cannot read the image '.*3\.png'") as caught:
        embed_folder(settings(data=given))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read"):
        embed_folder(settings(data={"path": photos}, output_dir=tmp_path / "checked"))
    skipping = settings(
        data={"path": photos, "skip_unreadable": True}, output_dir=tmp_path / "skipped"
    )
    with pytest.warns(UserWarning, match="1 unreadable"):
        assert embed_folder(skipping)["rows"] == 11


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"part": 5}, "part=5 must be a multiple of data.batch_size=2, such as 6"),
        ({"format": "csv"}, "format='csv' must be parquet, npy or safetensors"),
        ({"checkpoint": "pixels"}, "checkpoint=pixels has no prototypes"),
        ({"data": {"crop_size": 30, "resize": 20}}, "data.crop_size=30 must be at most resize=20"),
    ],
)
def test_what_cannot_be__is_told_first(changes, sentence, settings, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        embed_folder(settings(**changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_are_no_utf8__are_kept_or_refused(kind, settings, tmp_path, image_folders):
    photos = tmp_path / "photos"
    photos.mkdir()
    name = b"caf\xe9.png"
    shutil.copy(image_folders / "train" / "red" / "0.png", os.fsencode(photos) + b"/" + name)
    given = settings(format=kind, data={"path": photos})
    if kind == "parquet":
        with pytest.raises(ValueError, match=r"cannot hold the file name .*caf\\xe9\.png"):
            embed_folder(given)
        return
    embed_folder(given)
    if kind == "npy":
        assert np.load(tmp_path / "out" / "table" / "path.npy").tolist() == [name]
    else:
        file = tmp_path / "out" / "table" / "part-00000-of-00001.safetensors"
        with safetensors.safe_open(file, "np") as opened:
            assert os.fsencode(json.loads(opened.metadata()["dinovmf_plugin"])["path"][0]) == name


def test_a_full_disk__names_the_file_and_what_is_whole_stays(settings, monkeypatch, tmp_path):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 10:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"table/.*\.npy cannot be written: No space left on device"):
        embed_folder(settings(format="npy"))
    monkeypatch.setattr(os, "fsync", real)
    assert embed_folder(settings(format="npy"))["rows_of_this_start"] == 8
