"""DALI's crops beside torchvision's: the same picture and parameters, and many crops' statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")

from dinovmf_plugin.data.dali.loaders import DALIEvaluationLoader, DALILoader
from dinovmf_plugin.data.evaluation_loaders import CenterCrop, evaluation_loader
from dinovmf_plugin.data.folders import list_images
from dinovmf_plugin.data.loaders import PretrainLoader
from dinovmf_plugin.data.recipe import parse_recipe
from dinovmf_plugin.data.sampling import EpochPlan

OFF = {"jitter": 0.0, "gray": 0.0, "flip": 0.0}
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def crops_of(
    root: Path, pipelines: list[dict[str, Any]], backend: str, epochs: int = 1
) -> list[torch.Tensor]:
    """All crops of a folder by position in the recipe, ``(images * epochs, 3, size, size)`` in [0, 255]."""
    images, recipe = list_images(root), parse_recipe(pipelines)
    plan = EpochPlan(len(images), len(images), seed=5)
    if backend == "dali":
        loader: Any = DALILoader(images, recipe, plan, device="cpu", num_threads=1)
    else:
        loader = PretrainLoader(images, recipe, plan, num_workers=0)
    batches = [crops for _ in range(epochs) for _, crops, _ in loader]
    return [
        torch.cat([crops[n] for crops in batches]) * STD * 255 + MEAN * 255
        for n in range(len(recipe))
    ]


@pytest.mark.parametrize(
    ("change", "mean_error", "bias"),
    [
        ({}, 0.8, 0.2),
        ({"flip": 1.0}, 0.8, 0.2),
        ({"scale": (0.05, 0.2)}, 0.8, 0.2),
        ({"gray": 1.0}, 0.9, 0.5),
        ({"solarize": 1.0}, 1.0, 0.5),
        ({"blur": 1.0}, 1.6, 0.4),
        ({"equalize": 1.0, "size": 128}, 3.0, 1.5),  # PIL counts in whole steps: coarse if small
        ({"jitter": 1.0}, 9.0, 2.0),
    ],
    ids=["crop", "flip", "enlarged", "gray", "solarize", "blur", "equalize", "jitter"],
)
def test_same_parameters_same_pixels(
    folder: Path, make_pipeline: Any, change: dict[str, Any], mean_error: float, bias: float
) -> None:
    """Mean absolute difference and mean difference in gray levels (of 256)."""
    pipeline = make_pipeline(**{"size": 40, "count": 3, **OFF, **change})
    ours, reference = (
        torch.cat(crops_of(folder, [pipeline], backend)) for backend in ("dali", "torchvision")
    )
    difference = ours - reference
    assert difference.abs().mean() < mean_error
    assert difference.mean((0, 2, 3)).abs().max() < bias


def statistics(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    histogram = (
        torch.stack([torch.histc(crops[:, c], 8, 0, 255) for c in range(3)]) / crops[:, 0].numel()
    )
    per_crop = crops.flatten(2)
    return {
        "mean": per_crop.mean((0, 2)),
        "spread of means": per_crop.mean(2).std(0),
        "std": per_crop.std(2).mean(0),
        "roughness": crops.diff(dim=-1).abs().mean((0, 2, 3)),
        "histogram": histogram,
    }


def test_whole_recipe__statistics_of_torchvision(
    folder: Path, multicrop: list[dict[str, Any]]
) -> None:
    """Per position of the recipe, so that no crop gets another one's blur or solarisation."""
    tolerance = {
        "mean": 2.5,
        "spread of means": 1.5,
        "std": 1.5,
        "roughness": 0.6,
        "histogram": 0.012,
    }
    ours, reference = (
        crops_of(folder, multicrop, backend, epochs=6) for backend in ("dali", "torchvision")
    )
    for position, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        found, expected = statistics(mine), statistics(theirs)
        for name, value in expected.items():
            worst = (found[name] - value).abs().max()
            assert worst < tolerance[name], (position, name, float(worst))


@pytest.fixture(scope="module")
def gradient_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that show where a crop comes from: red grows with the column, green with the row."""
    root = tmp_path_factory.mktemp("gradients")
    (root / "c").mkdir()
    height, width = 90, 120
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 2, rows * 2, np.full_like(rows, 100)], axis=-1).astype(np.uint8)
    for index in range(40):
        Image.fromarray(pixels).save(root / "c" / f"{index:02d}.png")
    return root


def test_areas_positions_and_flips__read_from_the_pixels(
    gradient_folder: Path, make_pipeline: Any
) -> None:
    scale = (0.25, 1.0)
    pipeline = make_pipeline(30, 10, scale, **{**OFF, "flip": 0.5})
    crops = torch.cat(crops_of(gradient_folder, [pipeline], "dali", epochs=2))
    assert len(crops) == 800
    # from one pixel's center to another one's, k output pixels apart, in source pixels
    width = (crops[:, 0, 15, 24] - crops[:, 0, 15, 5]) / 2 * 30 / 19
    height = (crops[:, 1, 24, 15] - crops[:, 1, 5, 15]) / 2 * 30 / 19
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.06)
    area = (width.abs() * height).numpy() / (90 * 120)
    middle = crops[:, 0, 15, 15].numpy() / 2
    torch.manual_seed(0)
    picture = Image.new("RGB", (120, 90))
    boxes = np.array(
        [
            transforms.RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3))
            for _ in range(2000)
        ]
    )
    assert stats.ks_2samp(area, boxes[:, 2] * boxes[:, 3] / (90 * 120)).pvalue > 1e-3
    assert stats.ks_2samp(middle, boxes[:, 1] + boxes[:, 3] / 2).pvalue > 1e-3


def test_shares_of_gray_solarised_blurred__read_from_the_pixels(
    folder: Path, make_pipeline: Any
) -> None:
    shares = {"gray": 0.2, "solarize": 0.2, "blur": 0.1}
    plain = dict.fromkeys(shares, 0.0)
    base = torch.cat(
        crops_of(folder, [make_pipeline(24, 10, **{**OFF, **plain})], "dali", epochs=2)
    )
    for name, share in shares.items():
        pipeline = make_pipeline(24, 10, **{**OFF, **plain, name: share})
        crops = torch.cat(crops_of(folder, [pipeline], "dali", epochs=2))
        changed = (crops - base).abs().flatten(1).amax(1) > 0.6
        assert changed.float().mean() == pytest.approx(share, abs=0.05), name
        if name == "gray":
            assert (crops[changed][:, :1] - crops[changed]).abs().max() < 0.1
        if name == "solarize":
            expected = torch.where(base < 127.5, base, 255 - base)
            assert (crops[changed] - expected[changed]).abs().max() < 0.1


def test_center_crop__torchvisions_pixels(folder: Path) -> None:
    images, transform = list_images(folder), CenterCrop(40, 32)
    ours = list(
        DALIEvaluationLoader(images, transform=transform, batch_size=8, device="cpu", num_threads=1)
    )
    reference = list(evaluation_loader(images, transform=transform, batch_size=8, num_workers=0))
    assert [len(batch) for batch, _ in ours] == [8, 8, 6]
    for (mine, labels), (theirs, other) in zip(ours, reference, strict=True):
        assert torch.equal(labels, other)
        assert (
            (mine - theirs) * STD * 255
        ).abs().max() < 1.6  # one gray level of rounding in each pass


def test_color__the_gpu_formula_gives_the_cpu_pixels(picture: Any) -> None:
    """The offset is an argument on the CPU and an addition on the GPU; both run here on the CPU."""
    from nvidia.dali import fn, pipeline_def

    from dinovmf_plugin.data.dali import pipeline as dali_pipeline

    rng = np.random.default_rng(0)
    pixels = [np.asarray(picture(seed, 20, 24)) for seed in range(3)]
    matrices = [rng.normal(0.3, 0.2, (3, 3, 3)).astype(np.float32) for _ in range(2)]

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def graph() -> Any:
        image = fn.external_source(source=lambda: pixels, batch=True, layout="HWC")
        names = ("pixel_matrix", "mean_matrix")
        nodes = fn.external_source(source=lambda: tuple(matrices), num_outputs=2, batch=True)
        inputs = dict(zip(names, nodes, strict=True))
        return tuple(dali_pipeline._color(image, inputs, device) for device in ("cpu", "gpu"))

    pipeline = graph()
    pipeline.build()
    cpu, gpu = (np.array(output.as_tensor()) for output in pipeline.run())
    assert cpu.std() > 20
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)
    for n in range(3):
        flat = pixels[n].reshape(-1, 3).astype(float)
        expected = flat @ matrices[0][n].T + matrices[1][n] @ flat.mean(axis=0)
        np.testing.assert_allclose(cpu[n].reshape(-1, 3), expected.clip(0, 255), atol=0.01)
