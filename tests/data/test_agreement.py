"""Two gloo processes whose folders differ: one sentence with both numbers, on both."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from dinovmf_plugin.data.agreement import same_on_all_ranks
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.module import training_images, validation_loader


def _pictures(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(root / name)
    return root


def _rank(rank: int, file: str, roots: list[str], kind: str, answers) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    data = {"train_path": roots[rank], "val_path": roots[rank], "num_workers": 0}
    cfg = {"data": {"dataset": "custom", **data}, "optimizer": {"batch_size": 2}}
    try:
        if kind == "train":
            answers.put((rank, f"{len(training_images(cfg, world_size=2))} images"))
        else:
            loader = validation_loader(cfg, transform=CenterCrop(36, 32), rank=rank, world_size=2)
            answers.put((rank, f"{len(loader.dataset)} images"))
    except (ValueError, OSError, RuntimeError) as error:
        answers.put((rank, str(error)))
    dist.barrier()
    answers.close()
    answers.join_thread()
    os._exit(0)


def _ask(tmp_path: Path, roots: list[Path], kind: str) -> list[str]:
    context = multiprocessing.get_context("fork")
    answers, file = context.Queue(), str(tmp_path / f"rendezvous-{kind}")
    given = [str(root) for root in roots]
    ranks = [context.Process(target=_rank, args=(r, file, given, kind, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return [found[0], found[1]]


NAMES = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


@pytest.mark.parametrize("kind", ["train", "val"])
def test_incomplete_copy__both_numbers_on_both_ranks(tmp_path, kind):
    roots = [_pictures(tmp_path / "0", NAMES), _pictures(tmp_path / "1", NAMES[:3])]
    first, second = _ask(tmp_path, roots, kind)
    assert first == second
    assert f"data.{kind}_path holds 4 images for rank 0 on " in first
    assert " and 3 for rank 1 on " in first
    assert "\n" not in first


@pytest.mark.parametrize("kind", ["train", "val"])
def test_same_number_other_names__told(tmp_path, kind):
    roots = [_pictures(tmp_path / "0", NAMES), _pictures(tmp_path / "1", [*NAMES[:3], "b/2.png"])]
    first, second = _ask(tmp_path, roots, kind)
    assert first == second
    assert "holds 4 images for rank 0 on" in first
    assert "names or classes differ" in first


def test_folder_missing_on_one_rank__the_other_is_told(tmp_path):
    roots = [_pictures(tmp_path / "0", NAMES), tmp_path / "1"]
    first, second = _ask(tmp_path, roots, "train")
    assert first.startswith("rank 1 on ")
    assert second in first
    assert str(roots[1]) in second


@pytest.mark.parametrize(("kind", "count"), [("train", 4), ("val", 2)])
def test_same_images__nothing_told(tmp_path, kind, count):
    roots = [_pictures(tmp_path / str(rank), NAMES) for rank in range(2)]
    assert _ask(tmp_path, roots, kind) == [f"{count} images"] * 2


def test_one_process__only_listed(tmp_path):
    root = _pictures(tmp_path, NAMES)
    assert len(same_on_all_ranks(lambda: list_images(root), "data.train_path", 1)) == 4
