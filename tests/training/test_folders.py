"""Which folder is a run's, and which checkpoint in it is the one to go on from."""

from __future__ import annotations

import zipfile

import torch
from omegaconf import OmegaConf

from dinovmf_plugin.training.checkpointer import Checkpointer
from dinovmf_plugin.training.folders import choose_folder, find_checkpoint, is_whole, run_identity
from tests.training.small_runs import first_epoch, run_cfg, train

# ---- identity ------------------------------------------------------------------------------------


def test_run_identity__same_run__same_digits(tmp_path):
    cfg = run_cfg(tmp_path)
    identity = run_identity(cfg)
    assert len(identity) == 8
    assert int(identity, 16) >= 0
    for key, value in (
        ("checkpoint.dir", "elsewhere"),
        ("checkpoint.frequency", 7),
        ("auto_resume.enabled", True),
        ("resume_from_checkpoint", None),
        ("wandb.enabled", True),
        ("debug_augmentations", True),
        ("data.num_workers", 16),
        ("enable_progress_bar", False),
    ):
        assert run_identity(run_cfg(tmp_path, **{key: value})) == identity, key
    assert run_identity(cfg) == identity  # computing it changes nothing
    reordered = OmegaConf.create(dict(reversed(OmegaConf.to_container(cfg).items())))
    assert run_identity(reordered) == identity


def test_run_identity__anything_else__other_digits(tmp_path):
    identity = run_identity(run_cfg(tmp_path))
    for key, value in (
        ("seed", 1),
        ("method", "ibot_vmf"),
        ("method_kwargs.normalization", "l2"),
        ("data.train_path", "y"),
        ("max_epochs", 3),
        ("resume_from_checkpoint", "file.ckpt"),
        ("anything.new", 1),
    ):
        assert run_identity(run_cfg(tmp_path, **{key: value})) != identity, key


def test_run_identity__one_folder_by_any_name__same_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for key in ("data.train_path", "data.val_path"):
        names = (
            "photos",
            "photos/",
            "./photos",
            "link",
            "link/../photos",
            str(tmp_path / "photos"),
        )
        assert len({run_identity(run_cfg(tmp_path, **{key: name})) for name in names}) == 1, key
        assert run_identity(run_cfg(tmp_path, **{key: "photos2"})) != run_identity(
            run_cfg(tmp_path, **{key: "photos"})
        )


def test_choose_folder__of_a_resumed_file(tmp_path):
    """Its own, but never that of another run."""
    cfg = run_cfg(tmp_path)
    own = tmp_path / "dino_vmf" / f"run-{run_identity(cfg)}"
    for folder in (own, own.with_name(f"{own.name}-2"), own.with_name(f"{own.name}-12")):
        assert choose_folder(cfg, folder / "x.ckpt") == folder
        assert choose_folder(cfg, folder / "previous" / "x.ckpt") == folder
    for folder in (
        tmp_path / "a",
        own.with_name(f"{own.name}-b"),
        own.with_name("run-2"),
        own / "a",
    ):
        assert choose_folder(cfg, folder / "x.ckpt") == own
        assert choose_folder(cfg, folder / "previous" / "x.ckpt") == own


def test_is_whole__truncated_or_corrupted__false(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"weight": torch.arange(5000.0)}, path)
    content = path.read_bytes()
    assert is_whole(path)
    for damaged in (b"", content[:10], content[: len(content) // 2], content[:-1], b"no archive"):
        path.write_bytes(damaged)
        assert not is_whole(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF  # a bit error inside the data: the checksum sees it
    path.write_bytes(bytes(flipped))
    assert zipfile.is_zipfile(path)
    assert not is_whole(path)
    assert not is_whole(tmp_path / "absent.ckpt")


def test_find_checkpoint__newest_whole_one_of_this_run(tmp_path, capsys):
    cfg = run_cfg(tmp_path, **{"checkpoint.keep_prev": True})
    assert find_checkpoint(cfg) is None
    train(cfg, epochs=12)
    newest = find_checkpoint(cfg)
    assert newest.name == "run-ep11.ckpt"  # by number, not by name
    assert capsys.readouterr().out.count("damaged") == 0
    newest.write_bytes(b"")
    assert find_checkpoint(cfg).name == "run-ep10.ckpt"
    assert f"checkpoint {newest} is truncated or damaged" in capsys.readouterr().out
    for path in tmp_path.rglob("*.ckpt"):
        path.write_bytes(b"")
    assert find_checkpoint(cfg) is None


def test_find_checkpoint__steps_between_epochs(tmp_path):
    """What a signal saved comes after the epoch before it and before the end of its own."""
    cfg = run_cfg(tmp_path)
    content = first_epoch(tmp_path / "other")
    folder = Checkpointer(cfg).path
    folder.joinpath("previous").mkdir(parents=True)
    for name in ("previous/run-ep9.ckpt", "run-ep10-step90.ckpt", "run-ep10-step101.ckpt"):
        folder.joinpath(name).write_bytes(content)
        assert find_checkpoint(cfg) == folder / name
    folder.joinpath("run-ep10.ckpt").write_bytes(content)
    assert find_checkpoint(cfg).name == "run-ep10.ckpt"
