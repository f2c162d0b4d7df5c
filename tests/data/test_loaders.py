import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.loaders import PretrainLoader
from dinovmf_plugin.data.recipe import parse_recipe
from dinovmf_plugin.data.sampling import EpochPlan


@pytest.fixture
def make_loader(folder: Path, multicrop: list[dict[str, Any]]) -> Any:
    def make(num_workers: int = 0, **plan: Any) -> PretrainLoader:
        source = list_images(folder)
        epochs = EpochPlan(**{"num_samples": len(source), "batch_size": 4, "seed": 1, **plan})
        return PretrainLoader(source, parse_recipe(multicrop), epochs, num_workers=num_workers)

    return make


def same(first: Any, second: Any) -> bool:
    return (
        torch.equal(first[0], second[0])
        and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
        and torch.equal(first[2], second[2])
    )


def test_batch__format_of_solo_learn(make_loader: Any, folder: Path) -> None:
    loader = make_loader()
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    indexes, crops, targets = batches[0]
    assert indexes.shape == targets.shape == (4,)
    assert indexes.dtype == targets.dtype == torch.int64
    assert [tuple(crop.shape) for crop in crops] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    labels = list_images(folder).labels
    assert targets.tolist() == labels[indexes.numpy()].tolist()


def test_same_batches_for_any_number_of_workers(make_loader: Any) -> None:
    """Two epochs: persistent workers must see the epoch change."""
    alone, workers = make_loader(0), make_loader(2)
    for _ in range(2):
        pairs = list(zip(alone, workers, strict=True))
        assert len(pairs) == 5
        assert all(same(a, b) for a, b in pairs)


def test_another_epoch_other_crops_of_the_same_image(make_loader: Any) -> None:
    loader = make_loader()
    crops: list[dict[int, torch.Tensor]] = []
    for _ in range(2):
        crops.append(
            {
                int(i): crop
                for idx, views, _ in loader
                for i, crop in zip(idx, views[0], strict=True)
            }
        )
    common = crops[0].keys() & crops[1].keys()
    assert len(common) >= 18
    assert not any(torch.equal(crops[0][i], crops[1][i]) for i in common)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumes_in_the_middle_of_an_epoch(make_loader: Any, num_workers: int) -> None:
    straight = make_loader()
    whole = [batch for _ in range(2) for batch in straight]
    interrupted = make_loader(num_workers)
    list(interrupted)
    iterator = iter(interrupted)
    next(iterator), next(iterator)
    resumed = make_loader(num_workers)
    resumed.load_state_dict(interrupted.state_dict())
    rest = list(resumed)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(rest, whole[7:], strict=True))


def test_ranks_share_the_epoch(make_loader: Any) -> None:
    loaders = [make_loader(rank=rank, world_size=2) for rank in range(2)]
    assert [len(loader) for loader in loaders] == [2, 2]
    seen = torch.cat([indexes for loader in loaders for indexes, _, _ in loader])
    assert len(seen.unique()) == len(seen) == 16


def test_unreadable_image_is_named_while_training(
    make_loader: Any, tmp_path: Path, picture_folder: Any
) -> None:
    root = picture_folder(tmp_path, 4)
    bad = root / "cat" / "001.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    source = list_images(root)
    recipe = parse_recipe([{"crop_size": 8, "num_crops": 1, "rrc": {"enabled": False}}])
    loader = PretrainLoader(source, recipe, EpochPlan(4, 4), num_workers=1)
    with pytest.raises(UnreadableImageError, match=r"^cannot read the image '.*cat/001\.jpg'"):
        list(loader)


def test_evaluation_loader__every_image_in_order(folder: Path) -> None:
    images = list_images(folder)
    batches = list(
        evaluation_loader(images, transform=CenterCrop(40, 32), batch_size=8, num_workers=0)
    )
    assert [tuple(b.shape) for b, _ in batches] == [(8, 3, 32, 32), (8, 3, 32, 32), (6, 3, 32, 32)]
    assert torch.cat([t for _, t in batches]).tolist() == images.labels.tolist()


@pytest.mark.parametrize(("height", "width"), [(50, 70), (70, 50), (41, 97), (64, 64)])
def test_center_crop__torchvisions_resize_and_crop(picture: Any, height: int, width: int) -> None:
    from torchvision import transforms

    reference = transforms.Compose(
        [
            transforms.Resize(37, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image, transform = picture(0, height, width), CenterCrop(37, 32)
    torch.testing.assert_close(transform(image), reference(image))
    resized = transforms.Resize(37)(image)
    assert transform.resized(height, width) == (resized.height, resized.width)


def test_center_crop__bad_input() -> None:
    with pytest.raises(
        ValueError, match="the crop size must be from 1 to the resize of 224, got 256"
    ):
        CenterCrop(224, 256)
    with pytest.raises(ValueError, match="interpolation must be one of .*, got 'area'"):
        CenterCrop(interpolation="area")


_IN_JOBLIB = """
import importlib, sys
from joblib import Parallel, delayed

def count(folder, module):
    importlib.import_module(module)
    from dinovmf_plugin.data.evaluation_loaders import evaluation_loader
    from dinovmf_plugin.data.folders import list_images
    loader = evaluation_loader(list_images(folder), num_workers=1)
    return sum(len(images) for images, _ in loader)

print(*Parallel(n_jobs=2)(delayed(count)(sys.argv[1], module) for module in sys.argv[2:]))
"""


@pytest.mark.slow
def test_workers_in_joblibs_processes(folder: Path) -> None:
    """hydra's joblib launcher: their start method is called "loky", which no other process knows."""
    pytest.importorskip("nvidia.dali", reason="without DALI workers are forked")
    command = [sys.executable, "-c", _IN_JOBLIB, str(folder), "nvidia.dali", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["22", "22"], done.stderr


_PRELOADED = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import nvidia.dali
from dinovmf_plugin.data.loaders import worker_start_method
context = multiprocessing.get_context(worker_start_method(1))
with ProcessPoolExecutor(1, mp_context=context) as pool:
    loaded = pool.submit(eval, "'dinovmf_plugin.data.loaders' in __import__('sys').modules")
    print(loaded.result())
"""


def test_workers_find_the_libraries_loaded() -> None:
    pytest.importorskip("nvidia.dali", reason="without DALI workers are forked")
    command = [sys.executable, "-c", _PRELOADED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True"], done.stderr
