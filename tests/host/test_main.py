"""solo-learn main: its own, unmodified scripts run with nothing but the plugin installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinovmf_plugin import host

pytestmark = pytest.mark.skipif(host.GENERATION != "main", reason="tests solo-learn main")

CHECKOUT = Path(host.solo.__file__).resolve().parents[1]
needs_scripts = pytest.mark.skipif(
    not (CHECKOUT / "main_pretrain.py").is_file(),
    reason="solo-learn main is installed without its scripts",
)


def test_base__config_without_momentum_node__defaults(tiny_cfg, build):
    cfg = tiny_cfg()
    OmegaConf.update(cfg, "momentum", None, merge=False)
    module = build(cfg)
    assert (module.cfg.momentum.base_tau, module.cfg.momentum.final_tau) == (0.99, 1.0)


def test_extra_backbone__is_in_the_hosts_table(tiny_cfg, build):
    module = build(tiny_cfg(), depth=None)
    assert (module.features_dim, len(module.backbone.blocks)) == (128, 4)
    assert type(module.backbone).__module__.startswith("timm.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes that differ in color: 2 x 6 for training, 2 x 2 for validation."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, color in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-30, 30, (40, 40, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def _python(*arguments: str, folder: Path, first: Path = CHECKOUT) -> str:
    """Output of a Python process; its modules come from ``first``, then from solo-learn main."""
    path = os.pathsep.join([str(first), str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    return out.stdout + out.stderr


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


def _overrides(pictures: Path, tmp_path: Path) -> list[Any]:
    return [
        f"data.train_path={pictures / 'train'}",
        f"data.val_path={pictures / 'val'}",
        f"checkpoint.dir={tmp_path / 'runs'}",
        "data.format=image_folder",
        "data.num_workers=0",
        "dinovmf/augmentations=demo",
        "backbone.name=vit_nano",
        "backbone.kwargs.img_size=32",
        "method_kwargs.num_prototypes=32",
        "method_kwargs.proj_hidden_dim=16",
        "method_kwargs.proj_output_dim=8",
        "optimizer.batch_size=4",
        "max_epochs=2",
        "scheduler.warmup_epochs=1",
        "accelerator=cpu",
        "knn_eval.enabled=True",
        "knn_eval.k=2",
        "+enable_progress_bar=False",
    ]


@needs_scripts
def test_unmodified_main_pretrain_then_main_knn(pictures, tmp_path):
    script = str(CHECKOUT / "main_pretrain.py")
    overrides = _overrides(pictures, tmp_path)
    _python(script, "--config-name", "dinovmf/custom/dino_vmf", *overrides, folder=tmp_path)
    (checkpoint,) = _files(tmp_path / "runs", "*-ep1.ckpt")
    assert checkpoint.parent.parent.name == "dino_vmf"
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 6
    assert content["dinovmf_plugin"]["cfg"]["method_kwargs"]["normalization"] == "vmf"
    assert content["state_dict"]["centering.center"].abs().sum() > 0
    # one checkpointer: the host's would have made another folder, or another args.json
    assert len(_files(tmp_path / "runs", "args.json")) == 1
    assert len(_files(tmp_path / "runs", "*.ckpt")) == 2

    arguments = (
        "--dataset custom --data_format image_folder --batch_size 4 --num_workers 0 "
        "--k 1 5 --temperature 0.07 --distance_function cosine euclidean "
        f"--feature_type backbone projector --train_data_path {pictures / 'train'} "
        f"--val_data_path {pictures / 'val'} --pretrained_checkpoint_dir {checkpoint.parent}"
    ).split()
    script = str(CHECKOUT / "main_knn.py")
    out = _python("-m", "dinovmf_plugin", script, *arguments, folder=tmp_path)
    results = [float(x) for x in re.findall(r"Result: acc@1=([\d.]+)", out)]
    assert len(results) == 8  # 2 features x 2 k x 2 distances
    assert results[0] >= 75  # backbone, cosine, k = 1: red and blue are not hard to tell apart


@needs_scripts
def test_unmodified_main_umap__without_a_gpu(pictures, tmp_path):
    for module in ("umap", "seaborn", "pandas", "wandb"):
        pytest.importorskip(module)
    script = str(CHECKOUT / "main_pretrain.py")
    overrides = [*_overrides(pictures, tmp_path), "max_epochs=1", "scheduler.warmup_epochs=0"]
    _python(script, "--config-name", "dinovmf/custom/dino_vmf", *overrides, folder=tmp_path)
    (checkpoint,) = _files(tmp_path / "runs", "*.ckpt")
    train = pictures / "train"
    arguments = (
        "--dataset custom --data_format image_folder --batch_size 4 --num_workers 0 "
        f"--train_data_path {train} --val_data_path {train} "  # of 4 images UMAP makes no picture
        f"--pretrained_checkpoint_dir {checkpoint.parent}"
    ).split()
    script = str(CHECKOUT / "main_umap.py")
    _python("-m", "dinovmf_plugin", script, *arguments, folder=tmp_path)
    for name in ("im100_train_umap.pdf", "im100_val_umap.pdf"):
        assert (tmp_path / name).read_bytes()[:5] == b"%PDF-"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    built, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = built / "source"  # a copy: a build leaves files behind
    skip = shutil.ignore_patterns(".*", "build", "results", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(Path(__file__).parents[2], source, ignore=skip)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(built), str(source)], check=True)
    (file,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(file)], check=True)
    return site


@pytest.mark.slow
@needs_scripts
def test_unmodified_main_pretrain__plugin_from_a_wheel(wheel, pictures, tmp_path):
    code = "import dinovmf_plugin as a, hydra_plugins.dinovmf as b; print(a.__file__, b.__file__)"
    for file in _python("-c", code, folder=tmp_path, first=wheel).split():
        assert Path(file).is_relative_to(wheel)
    script = str(CHECKOUT / "main_pretrain.py")
    overrides = [*_overrides(pictures, tmp_path), "max_epochs=1"]
    _python(
        script, "--config-name", "dinovmf/custom/dino_vmf", *overrides, folder=tmp_path, first=wheel
    )
    (checkpoint,) = _files(tmp_path / "runs", "*-ep0.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["dinovmf_plugin"]["cfg"]["method"] == "dino_vmf"


@needs_scripts
def test_unmodified_main_pretrain__own_config_and_method(pictures, tmp_path):
    """solo-learn's BYOL from its own config folder: the plugin is installed and stays out of the way."""
    script = str(CHECKOUT / "main_pretrain.py")
    overrides = [
        f"data.train_path={pictures / 'train'}",
        f"data.val_path={pictures / 'val'}",
        f"checkpoint.dir={tmp_path / 'runs'}",
        "data.format=image_folder",
        "data.num_workers=0",
        "method_kwargs.proj_hidden_dim=16",
        "method_kwargs.pred_hidden_dim=16",
        "optimizer.batch_size=4",
        "++scheduler.warmup_epochs=0",
        "auto_resume.enabled=False",
        "max_epochs=1",
        "accelerator=cpu",
        "devices='1'",
        "strategy=auto",
        "sync_batchnorm=False",
        "precision=32-true",
        "wandb.enabled=False",
        "+enable_progress_bar=False",
    ]
    folder = str(CHECKOUT / "scripts" / "pretrain" / "custom")
    arguments = ["--config-path", folder, "--config-name", "byol", *overrides]
    _python(script, *arguments, folder=tmp_path)
    (checkpoint,) = _files(tmp_path / "runs", "*.ckpt")
    content = torch.load(checkpoint, weights_only=False)
    assert "dinovmf_plugin" not in content
    assert any(name.startswith("momentum_projector.") for name in content["state_dict"])
