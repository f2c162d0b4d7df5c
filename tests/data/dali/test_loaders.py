import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")

from dinovmf_plugin.data.dali.loaders import DALIEvaluationLoader, DALILoader
from dinovmf_plugin.data.decoding import UnreadableImageError
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.loaders import PretrainLoader
from dinovmf_plugin.data.recipe import parse_recipe
from dinovmf_plugin.data.sampling import EpochPlan


@pytest.fixture
def make_loader(folder: Path, multicrop: list[dict[str, Any]]) -> Any:
    def make(
        num_threads: int = 1, root: Path = folder, labeled: bool = True, **plan: Any
    ) -> DALILoader:
        images = list_images(root, labeled=labeled)
        epochs = EpochPlan(**{"num_samples": len(images), "batch_size": 4, "seed": 1, **plan})
        return DALILoader(
            images, parse_recipe(multicrop), epochs, device="cpu", num_threads=num_threads
        )

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
    assert indexes.dtype == targets.dtype == torch.int64
    assert [tuple(crop.shape) for crop in crops] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert all(crop.dtype == torch.float32 and crop.is_contiguous() for crop in crops)
    labels = list_images(folder).labels
    for indexes, _, targets in batches:
        assert targets.tolist() == labels[indexes.numpy()].tolist()


def test_indexes_are_true__the_crops_are_those_of_the_image(make_loader: Any, folder: Path) -> None:
    """torchvision's loader of the same seed made the same crops of the same images."""
    images = list_images(folder)
    loader = make_loader()
    other = PretrainLoader(images, loader.recipe, loader.plan, num_workers=0)
    for _ in range(2):
        for mine, theirs in zip(loader, other, strict=True):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[2], theirs[2])
            for a, b in zip(mine[1], theirs[1], strict=True):
                assert (a - b).abs().mean() < 0.2


def test_seeds_and_epochs(make_loader: Any) -> None:
    first, again, other = make_loader(), make_loader(num_threads=2), make_loader(seed=2)
    epochs = [[list(loader) for _ in range(2)] for loader in (first, again, other)]
    for epoch in range(2):
        assert all(same(a, b) for a, b in zip(epochs[0][epoch], epochs[1][epoch], strict=True))
    assert not any(same(a, b) for a, b in zip(epochs[0][0], epochs[0][1], strict=True))
    assert not any(same(a, b) for a, b in zip(epochs[0][0], epochs[2][0], strict=True))


def test_batches_stay_what_they_were(make_loader: Any) -> None:
    """The tensors share memory with DALI, which must not write to it again."""
    loader = make_loader()
    kept = [batch for _ in range(3) for batch in loader]
    copies = [
        [batch[0].clone(), [crop.clone() for crop in batch[1]], batch[2].clone()] for batch in kept
    ]
    for _ in range(3):
        list(loader)
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))
    fresh = make_loader()
    expected = [batch for _ in range(3) for batch in fresh]
    assert all(same(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("consumed", [1, 4])
def test_resumes_in_the_middle_of_an_epoch(make_loader: Any, consumed: int) -> None:
    straight = make_loader()
    whole = [batch for _ in range(3) for batch in straight]
    interrupted = make_loader()
    list(interrupted)
    iterator = iter(interrupted)
    for _ in range(consumed):
        next(iterator)
    resumed = make_loader()
    resumed.load_state_dict(interrupted.state_dict())
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == 10 - consumed
    assert all(same(a, b) for a, b in zip(rest, whole[5 + consumed :], strict=True))


def test_resumes_at_an_epoch(make_loader: Any) -> None:
    straight = make_loader()
    epochs = [list(straight) for _ in range(3)]
    resumed = make_loader()
    resumed.sampler.set_epoch(2)
    assert all(same(a, b) for a, b in zip(resumed, epochs[2], strict=True))


def test_an_epoch_left_early_does_not_leak_into_the_next(make_loader: Any) -> None:
    whole, loader = list(make_loader()), make_loader()
    for stop in (1, 3):
        for step, batch in enumerate(loader):
            assert same(batch, whole[step])
            if step == stop:
                break
    assert all(same(a, b) for a, b in zip(loader, whole, strict=True))


def test_ranks_share_the_epoch_and_the_crops(make_loader: Any) -> None:
    loaders = [make_loader(rank=rank, world_size=2) for rank in range(2)]
    assert [len(loader) for loader in loaders] == [2, 2]
    single = list(make_loader(batch_size=8))
    for step, halves in enumerate(zip(*loaders, strict=True)):
        assert torch.equal(torch.cat([half[0] for half in halves]), single[step][0])
        assert torch.equal(torch.cat([half[1][0] for half in halves]), single[step][1][0])
    seen = torch.cat([batch[0] for batch in single])
    assert len(seen.unique()) == len(seen) == 16


def test_unlabeled_flat_folder_of_other_formats(
    make_loader: Any, tmp_path: Path, picture: Any
) -> None:
    for n, ending in enumerate(("jpg", "png", "webp", "bmp", "tiff", "ppm")):
        picture(n, 40, 50).save(tmp_path / f"{n}.{ending}")
    picture(7, 40, 50).convert("L").save(tmp_path / "gray.jpg")
    picture(8, 40, 50).convert("RGBA").save(tmp_path / "alpha.png")
    loader = make_loader(root=tmp_path, labeled=False)
    batches = list(loader)
    assert len(batches) == 2
    assert all((batch[2] == -1).all() for batch in batches)
    assert sorted(torch.cat([batch[0] for batch in batches]).tolist()) == list(range(8))


def test_exif_orientation_is_left_alone_as_in_torchvision(tmp_path: Path, picture: Any) -> None:
    image = picture(0, 40, 60)
    exif = image.getexif()
    exif[0x0112] = 6
    (tmp_path / "c").mkdir()
    image.save(tmp_path / "c" / "turned.jpg", exif=exif, quality=95)
    images, transform = list_images(tmp_path), CenterCrop(32, 32)
    ((mine, _),) = DALIEvaluationLoader(images, transform=transform, batch_size=1, device="cpu")
    theirs = transform(images.image(0))
    assert (mine[0] - theirs).abs().max() < 0.05


@pytest.mark.parametrize("damage", ["truncated", "no image", "gone"])
def test_unreadable_image_is_named_while_training(
    make_loader: Any, tmp_path: Path, picture_folder: Any, damage: str
) -> None:
    root = picture_folder(tmp_path, 8)
    loader = make_loader(root=root)
    bad = root / "cat" / "003.jpg"
    content = bad.read_bytes()
    if damage == "gone":
        bad.unlink()
    else:
        bad.write_bytes(content[: len(content) // 3] if damage == "truncated" else b"<html>")
    with pytest.raises(UnreadableImageError, match=r"^cannot read the image '.*cat/003\.jpg'"):
        list(loader)  # its two batches hold all eight images


def test_device(folder: Path, multicrop: list[dict[str, Any]]) -> None:
    images, recipe, plan = list_images(folder), parse_recipe(multicrop), EpochPlan(22, 4)
    with pytest.raises(
        ValueError, match=r"dali\.device must be one of \('cpu', 'gpu'\), got 'cuda'"
    ):
        DALILoader(images, recipe, plan, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="dali.device=gpu needs a CUDA device and there is none"
        ):
            DALILoader(images, recipe, plan, device="gpu")


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(loader: DALILoader, warm_up: int, epochs: int) -> float:
    """Megabytes gained per hundred epochs, the slope of a line through the resident size."""
    for _ in range(warm_up):
        list(loader)
    sizes = []
    for _ in range(epochs):
        for _ in loader:
            pass
        sizes.append(resident_megabytes())
    return float(np.polyfit(np.arange(epochs), sizes, 1)[0]) * 100


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads Linux's /proc"
)


@needs_linux
def test_memory_stays_flat_over_30_epochs(make_loader: Any) -> None:
    """22 images, 0.3 MB of crops a batch: 30 epochs that kept their batches would gain 40 MB."""
    assert growth(make_loader(), warm_up=10, epochs=30) < 10.0


@needs_linux
@pytest.mark.slow
def test_memory_stays_flat_over_300_epochs(make_loader: Any) -> None:
    assert growth(make_loader(), warm_up=20, epochs=300) < 1.0


@pytest.mark.gpu
def test_gpu__crops_of_the_cpu(folder: Path, multicrop: list[dict[str, Any]]) -> None:
    images, recipe, plan = list_images(folder), parse_recipe(multicrop), EpochPlan(22, 4)
    cpu, gpu = (DALILoader(images, recipe, plan, device=device) for device in ("cpu", "gpu"))
    for mine, theirs in zip(gpu, cpu, strict=True):
        assert torch.equal(mine[0].cpu(), theirs[0])
        assert mine[0].is_cuda
        assert torch.equal(mine[2].cpu(), theirs[2])
        for a, b in zip(mine[1], theirs[1], strict=True):
            assert (a.cpu() - b).abs().mean() < 0.05


@pytest.mark.gpu
def test_gpu__evaluation_crops_of_the_cpu(folder: Path) -> None:
    images = list_images(folder)
    cpu, gpu = (DALIEvaluationLoader(images, batch_size=5, device=d) for d in ("cpu", "gpu"))
    assert len(cpu) == len(gpu) == 5
    for (a, b), (c, d) in zip(gpu, cpu, strict=True):
        assert a.is_cuda
        assert torch.equal(b.cpu(), d)
        assert (a.cpu() - c).abs().mean() < 0.05


@pytest.mark.gpu
def test_gpu__batches_stay_as_they_were_handed_out(
    folder: Path, multicrop: list[dict[str, Any]]
) -> None:
    """DALI must not write a later batch into the memory of an earlier one."""
    loader = DALILoader(list_images(folder), parse_recipe(multicrop), EpochPlan(22, 4))
    kept, copies = [], []
    for _, crops, _ in loader:
        kept.append(crops)
        copies.append([crop.clone() for crop in crops])
    torch.cuda.synchronize()
    for crops, then in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(crops, then, strict=True))
