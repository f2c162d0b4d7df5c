"""Every source gives the images, labels, order and crops of the folder that its files were made of.

The files are written by the public library of their kind, and read by its own reader for comparison.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.module import pretrain_loader, validation_loader
from dinovmf_plugin.data.sources import SOURCES, STREAMS, Location
from dinovmf_plugin.data.sources.stream import list_stream
from dinovmf_plugin.data.sources.tar import list_shards, list_tar
from dinovmf_plugin.data.unreadable import find_unreadable

datasets = pytest.importorskip("datasets")
wds = pytest.importorskip("webdataset")
h5py = pytest.importorskip("h5py")

SEEKABLE = tuple(name for name in SOURCES if name not in (*STREAMS, "folder"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hugging Face's copies go to a folder of this test, and its library is kept off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def write_tar(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:  # shuffled: the order must not come from the archive
        for path in sorted(root.rglob("*.*"), key=lambda path: path.name[::-1]):
            tar.add(path, path.relative_to(root))
    return file


def write_shards(root: Path, folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    images = list_images(root)
    for shard, rows in enumerate(np.array_split(np.arange(len(images)), count)):
        with wds.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for row in rows.tolist():
                content = Path(images.path(row)).read_bytes()
                label = images.label(row)
                sample = {"jpg": content, "cls": label, "json": {"kind": images.classes[label]}}
                writer.write({"__key__": f"image{row:04d}", **sample})
    return folder


def _hub(root: Path) -> Any:
    images = list_images(root)
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(images.classes)),
    }
    rows = [Path(images.path(i)).read_bytes() for i in range(len(images))]
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": row, "path": None} for row in rows], "label": images.labels.tolist()},
        features=datasets.Features(features),
    )


def write_hub(root: Path, folder: Path) -> Path:
    _hub(root).save_to_disk(str(folder))
    return folder


def write_parquet(root: Path, folder: Path) -> Path:
    folder.mkdir()
    data = _hub(root)
    for shard in range(2):
        part = data.shard(2, shard, contiguous=True)
        part.to_parquet(str(folder / f"train-{shard:05d}-of-00002.parquet"))
    return folder


def write_h5(root: Path, file: Path) -> Path:
    with h5py.File(file, "w") as h5:
        for path in root.rglob("*.jpg"):
            data = np.frombuffer(path.read_bytes(), dtype="uint8")
            h5.create_dataset(str(path.relative_to(root)), data=data)
    return file


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "tar": write_tar,
    "wds": write_shards,
    "hfds": write_hub,
    "hfids": write_parquet,
    "h5": write_h5,
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> dict[tuple[str, str], str]:
    """``(source, train or val)`` -> path: 12 pictures of a, b, c and 5 of the same."""
    base = tmp_path_factory.mktemp("sources")
    found = {}
    for part, count in (("train", 12), ("val", 5)):
        root = base / part
        for i in range(count):
            path = root / "abc"[i % 3] / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i + 100 * count, 40, 48).save(path, quality=95)
        found["folder", part] = str(root)
        for source, write in WRITERS.items():
            ending = {"tar": ".tar", "h5": ".h5"}.get(source, "")
            found[source, part] = str(write(root, base / f"{part}_{source}{ending}"))
    return found


@pytest.fixture
def cfg(data_cfg: Any, paths: Any) -> Any:
    """Factory: the config of a source."""

    def make(source: str, **overrides: Any) -> Any:
        return data_cfg(
            data__source=source,
            data__train_path=paths[source, "train"],
            data__val_path=paths[source, "val"],
            optimizer__batch_size=3,
            **overrides,
        )

    return make


def _same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) > 0
    for (index, crops, label), (index_, crops_, label_) in zip(found, expected, strict=True):
        assert torch.equal(index, index_)
        assert torch.equal(label, label_)
        assert all(torch.equal(x, y) for x, y in zip(crops, crops_, strict=True))


@pytest.mark.parametrize("data_format", ["image_folder", "dali"])
@pytest.mark.parametrize("source", SEEKABLE)
def test_training__order_crops_labels_and_resume_of_the_folder(cfg, source, data_format):
    if data_format == "dali":
        pytest.importorskip("nvidia.dali")
    straight = pretrain_loader(cfg("folder", data__format=data_format))
    expected = [batch for _ in range(2) for batch in straight]
    loader = pretrain_loader(cfg(source, data__format=data_format))
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    resumed = pretrain_loader(cfg(source, data__format=data_format))
    resumed.load_state_dict(loader.state_dict())
    _same(first + [batch for _ in range(2) for batch in resumed], expected)


@pytest.mark.parametrize("source", SEEKABLE)
def test_workers_and_ranks__the_same_images(cfg, source):
    whole = list(pretrain_loader(cfg("folder", data__num_workers=2)))
    read = pretrain_loader(cfg(source, data__num_workers=2))
    _same(list(read), whole)
    read.close()
    shares = [
        torch.cat([batch[0] for batch in pretrain_loader(cfg(source), rank=rank, world_size=2)])
        for rank in range(2)
    ]
    assert sorted(torch.cat(shares).tolist()) == list(range(12))


@pytest.mark.parametrize("source", [*SEEKABLE, "hfids"])
def test_validation__the_folder_s_pixels_and_labels(cfg, source):
    for rank in range(2):
        found = list(validation_loader(cfg(source), rank=rank, world_size=2))
        expected = list(validation_loader(cfg("folder"), rank=rank, world_size=2))
        assert all(torch.equal(x, y) for x, y in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("data_format", ["image_folder", "dali"])
def test_stream__all_images_once_disjoint_over_ranks_and_resumed(cfg, paths, data_format):
    if data_format == "dali":
        pytest.importorskip("nvidia.dali")
    labels = list_images(paths["folder", "train"]).labels
    with pytest.warns(UserWarning, match=r"data\.source=hfids is a stream, which cannot seek"):
        loaders = [
            pretrain_loader(cfg("hfids", data__format=data_format), rank=rank, world_size=2)
            for rank in range(2)
        ]
    epochs = [[batch for _ in range(2) for batch in loader] for loader in loaders]
    for epoch in range(2):
        parts = [batch for share in epochs for batch in share[2 * epoch : 2 * epoch + 2]]
        assert sorted(torch.cat([batch[0] for batch in parts]).tolist()) == list(range(12))
        seen = torch.cat([batch[2] for batch in parts])
        assert torch.equal(seen.bincount(), torch.from_numpy(labels).bincount())
    orders = [torch.cat([batch[2] for batch in epochs[0][i : i + 2]]).tolist() for i in (0, 2)]
    assert orders[0] != orders[1]
    again = pretrain_loader(cfg("hfids", data__format=data_format), rank=1, world_size=2)
    again.load_state_dict({"epoch": 1, "step": 1, "plan": again._identity()})
    _same(list(again), epochs[1][3:])


def test_stream__any_number_of_workers(cfg, paths):
    expected = list(pretrain_loader(cfg("hfids")))
    loader = pretrain_loader(cfg("hfids", data__num_workers=2))
    _same(list(loader), expected)
    loader.close()
    stream = list_stream(paths["hfids", "train"], check="fast")
    content = {Path(p).read_bytes() for p in Path(paths["folder", "train"]).rglob("*.jpg")}
    assert {sample.data for sample in stream._samples(0, 0)} == content
    assert stream.classes == ("a", "b", "c")


def test_tar__as_timm_reads_it(paths, tmp_path):
    from timm.data import create_reader
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    ours = list_tar(paths["tar", "train"])
    theirs = create_reader("", root=paths["tar", "train"], cache_tarinfo=False)
    named = {theirs.filename(i): i for i in range(len(theirs))}
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        file, target = theirs[named[ours.name(i)]]
        assert (ours.read(i), ours.label(i)) == (file.read(), target)
    # an archive per class, and archives inside an archive
    (tmp_path / "classes").mkdir()
    for name in "abc":
        write_tar(Path(paths["folder", "train"]) / name, tmp_path / "classes" / f"{name}.tar")
    write_tar(tmp_path / "classes", tmp_path / "outer.tar")
    for path in (tmp_path / "classes", tmp_path / "outer.tar"):
        inner = list_tar(path)
        assert [inner.read(i) for i in range(len(inner))] == [
            ours.read(i) for i in range(len(ours))
        ]
        assert inner.labels.tolist() == ours.labels.tolist()
        assert set(ReaderImageInTar(str(path)).class_name_to_idx) == set(inner.classes)


def test_shards__as_webdataset_timm_and_dali_read_them(paths):
    ours = list_shards(paths["wds", "train"])
    shards = [str(path) for path in sorted(Path(paths["wds", "train"]).iterdir())]
    theirs = list(wds.WebDataset(shards, shardshuffle=False))
    assert [sample["jpg"] for sample in theirs] == [ours.read(i) for i in range(len(ours))]
    assert [int(sample["cls"]) for sample in theirs] == ours.labels.tolist()

    from timm.data import create_reader

    reader = create_reader("wds/", root=paths["wds", "train"], split="{000..001}.tar|12")
    for i, (image, label) in enumerate(reader):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ours.image(i)))
        assert label == ours.label(i)

    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def graph():
        return tuple(dali.fn.readers.webdataset(paths=shards, ext=["jpg", "cls"]))

    pipeline = graph()
    pipeline.build()
    images, labels = pipeline.run()
    for i in range(12):
        assert bytes(np.asarray(images[i])) == ours.read(i)
        assert int(bytes(np.asarray(labels[i]))) == ours.label(i)


def test_shards__endings_and_fields(paths):
    named = list_shards(paths["wds", "train"], image_key="png;jpg", label_key="kind")
    assert named.classes == ("a", "b", "c")
    assert named.labels.tolist() == list_shards(paths["wds", "train"]).labels.tolist()
    one = str(Path(paths["wds", "train"]) / "*1.tar")
    assert len(list_shards(one)) == 6
    with pytest.raises(ValueError, match=r"no images .* with data\.image_key=png$"):
        list_shards(paths["wds", "train"], image_key="png")
    with pytest.raises(ValueError, match=r"image0000\.json' has no field 'age' as a class"):
        list_shards(paths["wds", "train"], label_key="age")


def test_hub__as_timm_reads_it_and_splits(paths, tmp_path):
    from timm.data import create_reader

    reader = create_reader(f"hfds/{paths['hfids', 'train']}", split="train")
    ours = Location(paths["hfids", "train"], source="hfds").listed()
    for i in range(len(ours)):
        file, label = reader[i]
        assert (ours.read(i), ours.label(i)) == (file.read(), label)
    both = datasets.DatasetDict(
        train=_hub(Path(paths["folder", "train"])), test=_hub(Path(paths["folder", "val"]))
    )
    both.save_to_disk(str(tmp_path / "both"))
    path = str(tmp_path / "both")
    assert len(Location(path, source="hfds").listed()) == 12
    assert len(Location(path, "data.val_path", "hfds", split="test").listed()) == 5
    with pytest.raises(
        ValueError, match=r"no split 'validation': set data\.val_split to one of train, test"
    ):
        Location(path, "data.val_path", "hfds").listed()
    one = next(Path(paths["hfids", "train"]).iterdir())
    assert len(Location(str(one), source="hfds").listed()) == 6


@pytest.mark.parametrize("source", SEEKABLE)
def test_subset_and_pickle__the_same_images(paths, source):
    images = Location(paths[source, "train"], source=source).listed()
    images.read(0)  # with its file open
    few = pickle.loads(pickle.dumps(images)).subset(np.array([7, 2]))
    assert [few.read(0), few.read(1)] == [images.read(7), images.read(2)]
    assert few.labels.tolist() == [images.label(7), images.label(2)]
    assert few.path(1) == images.path(2)
    assert b"".join(few.stamps()) != b"".join(images.stamps())


@pytest.mark.parametrize("source", ["tar", "wds", "hfds", "hfids"])
def test_unlabeled__only_with_no_labels(data_cfg, picture, tmp_path, source):
    buffers = [io.BytesIO() for _ in range(4)]
    for i, buffer in enumerate(buffers):
        picture(i, 40, 40).save(buffer, "JPEG")
    path = tmp_path / f"flat{'' if source.startswith('hf') else '.tar'}"
    if source.startswith("hf"):
        rows = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(path))
    else:
        with wds.TarWriter(str(path)) as writer:
            for i, buffer in enumerate(buffers):
                writer.write({"__key__": f"{i}", "jpg": buffer.getvalue()})
    given = {"data__source": source, "data__train_path": str(path)}
    with pytest.raises(ValueError, match=r"data\.train_path: .*set data\.no_labels=True"):
        pretrain_loader(data_cfg(**given))
    ((_, _, labels),) = pretrain_loader(data_cfg(**given, data__no_labels=True))
    assert labels.tolist() == [-1] * 4
    assert Location(str(path), source=source).listed("auto").labels.tolist() == [-1] * 4


def _damage(source: str, path: str, target: Path) -> Path:
    """A copy whose sixth image is cut off."""
    if source in ("tar", "wds"):
        files = [path] if source == "tar" else sorted(map(str, Path(path).iterdir()))
        out = target / "bad.tar"
        with tarfile.open(out, "w") as new:
            for file in files:
                with tarfile.open(file) as old:
                    for entry in old:
                        data = old.extractfile(entry).read()
                        if entry.name.endswith(("05.jpg", "image0005.jpg")):
                            data = data[:300]
                        entry.size = len(data)
                        new.addfile(entry, io.BytesIO(data))
        return out
    if source == "h5":
        out = target / "bad.h5"
        out.write_bytes(Path(path).read_bytes())
        with h5py.File(out, "r+") as h5:
            data = h5["c/05.jpg"][:300]
            del h5["c/05.jpg"]
            h5.create_dataset("c/05.jpg", data=data)
        return out
    found = Location(path, source="hfds").listed()
    rows = [found.read(i)[: 300 if i == 5 else None] for i in range(len(found))]
    data = {"image": [{"bytes": row, "path": None} for row in rows], "label": found.labels.tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    datasets.Dataset.from_dict(data, features=datasets.Features(features)).save_to_disk(
        str(target / "bad")
    )
    return target / "bad"


@pytest.mark.parametrize("source", [*SEEKABLE, "hfids"])
def test_damaged_image__named_before_training(cfg, paths, tmp_path, source):
    given = cfg(source)
    given["data"]["train_path"] = str(_damage(source, paths[source, "train"], tmp_path))
    with pytest.raises(
        UnreadableImageError, match=r"data\.train_path: 1 of 12 images .*cannot be read: .*5"
    ):
        pretrain_loader(given)
    given["data"]["skip_unreadable"] = True
    if source == "hfids":
        with pytest.raises(ValueError, match=r"skip_unreadable=True needs a source that can seek"):
            pretrain_loader(given)
    else:
        assert pretrain_loader(given).plan.num_samples == 11


def _zip(root: Path) -> Path:
    path = root / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a/1.jpg"), io.BytesIO())
    return path


def _cut(root: Path) -> Path:
    with tarfile.open(root / "x.tar", "w") as tar:
        for name in ("a/1.jpg", "a/2.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 3000
            tar.addfile(entry, io.BytesIO(bytes(3000)))
    (root / "x.tar").write_bytes((root / "x.tar").read_bytes()[:5000])
    return root / "x.tar"


def _texts(root: Path) -> Path:
    with tarfile.open(root / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a/notes.txt"), io.BytesIO())
    return root / "x.tar"


def _words(root: Path) -> Path:
    (root / "x.tar").write_text("no archive " * 100)
    return root / "x.tar"


def _folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


@pytest.mark.parametrize(
    ("source", "make", "error", "words"),
    [
        ("tarball", _texts, ValueError, r"data\.source must be one of .*, got 'tarball'"),
        ("tar", _zip, ValueError, "is compressed, so no image can be found by its position"),
        ("tar", _cut, ValueError, "is no whole tar archive: unexpected end of data"),
        ("wds", _words, ValueError, "is no whole tar archive"),
        ("tar", _texts, ValueError, r"there are no images \(\.jpg, .* in .*x\.tar"),
        ("wds", _texts, ValueError, r"there are no images \(\.jpg, .* in .*x\.tar"),
        ("tar", _folder, FileNotFoundError, r"is a folder without \.tar files"),
        ("wds", lambda root: root / "*.tar", FileNotFoundError, "does not exist"),
        ("hfds", lambda root: "user/dataset", FileNotFoundError, "needs a local path, nothing is"),
        ("hfids", lambda root: "user/dataset", FileNotFoundError, "needs a local path, nothing is"),
        ("hfds", _folder, ValueError, "is no Hugging Face data set on disk"),
        ("h5", _words, ValueError, r"is no HDF5 file \(data\.source=h5\)"),
    ],
)
def test_what_cannot_be_read__one_sentence(data_cfg, tmp_path, source, make, error, words):
    given = data_cfg(data__source=source, data__train_path=str(make(tmp_path)))
    with pytest.raises(error, match=words) as raised:
        pretrain_loader(given)
    assert "\n" not in str(raised.value)


def test_options_of_other_sources__refused(cfg):
    with pytest.raises(ValueError, match=r"data\.label_key='kind' is for data\.source=wds or hfds"):
        pretrain_loader(cfg("tar", data__label_key="kind"))
    with pytest.raises(ValueError, match=r"data\.train_split='train' is for data\.source=hfds or"):
        pretrain_loader(cfg("h5", data__train_split="train"))
    with pytest.raises(ValueError, match=r"has no column 'kind': set data\.label_key to one of"):
        pretrain_loader(cfg("hfds", data__label_key="kind"))
    with pytest.raises(ValueError, match=r"data\.fraction=0\.5 needs a source that can seek"):
        pretrain_loader(cfg("hfids", data__fraction=0.5))
    with pytest.raises(ValueError, match=r"data\.source=tar does not read data\.dataset=cifar10"):
        pretrain_loader(cfg("tar", data__dataset="cifar10"))


def test_datasets_missing__one_sentence(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"not installed: pip install \"dinovmf-plugin\[sources\]"
    ):
        pretrain_loader(cfg("hfds"))


def test_tar__many_headers_and_hidden_files(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("./a/._1.jpg", "./a/1.jpg", ".hidden/2.jpg", f"a/{'long' * 40}.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("a/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    images = list_tar(tmp_path / "x.tar")
    assert [images.read(i) for i in range(len(images))] == [
        b"./a/1.jpg",
        f"a/{'long' * 40}.jpg".encode(),
    ]
    assert set(find_unreadable(images)) == {0, 1}
    assert json.dumps(images.classes) == '["a"]'
