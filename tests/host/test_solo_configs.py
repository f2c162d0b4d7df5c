"""solo-learn's own configs with ``method=`` changed and nothing else, by its own, unmodified script."""

from __future__ import annotations

import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from PIL import Image

from dinovmf_plugin import host

CHECKOUT = Path(host.solo.__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "main_pretrain.py"
pytestmark = pytest.mark.skipif(
    host.GENERATION != "main" or not SCRIPT.is_file(), reason="tests solo-learn main's scripts"
)

# what a machine without a GPU and a test need; no key of the method among them
MACHINE = [
    "accelerator=cpu",
    "devices='1'",
    "strategy=auto",
    "sync_batchnorm=False",
    "precision=32-true",
    "wandb.enabled=False",
    "data.num_workers=0",
    "optimizer.batch_size=2",
    "max_epochs=1",
    "++scheduler.warmup_epochs=0",
    "+limit_train_batches=1",
    "+limit_val_batches=1",
    "+num_sanity_val_steps=0",
    "+enable_progress_bar=False",
    "+enable_model_summary=False",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """CIFAR-10 of 24 images as torchvision unpacks it, and folders of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    cifar = root / "cifar-10-batches-py"
    cifar.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
        (cifar / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]}))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def run(pictures, tmp_path, monkeypatch) -> Any:
    """Run main_pretrain.py in this process, as Python would; returns the trained module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(CHECKOUT))
    # the files above are not those whose sums torchvision knows
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    trained: list[Any] = []
    fit = Trainer.fit

    def keep(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        trained.append(model)
        fit(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", keep)

    def main(config: str | Path, *overrides: str) -> Any:
        folder, _, name = str(config).rpartition("/")
        folder = folder if Path(folder).is_absolute() else f"{CHECKOUT}/scripts/pretrain/{folder}"
        paths = [f"data.train_path={pictures}", f"data.val_path={pictures}"]
        if "imagenet" in folder:  # its own data set's labels, read by Pillow
            paths = [f"data.train_path={pictures / 'train'}", f"data.val_path={pictures / 'val'}"]
            paths.append("data.format=image_folder")
        command = ["--config-path", folder, "--config-name", name, *paths, *MACHINE, *overrides]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return trained.pop()

    return main


SMALL = ["method_kwargs.proj_hidden_dim=16", "method_kwargs.num_prototypes=48"]
NORMALIZATION = {
    "dino_vmf": "vmf",
    "dino_multicrop": "none",
    "ibot_vmf": "vmf",
    "ibot": "none",
    "msn": "none",  # dino_vit.yaml has norm_last_layer: False
    "msn_vmf": "vmf",
}


@pytest.mark.parametrize("method", ["dino_vmf", "dino_multicrop"])
def test_dino_of_cifar__resnet18(run, tmp_path, method):
    module = run("cifar/dino.yaml", f"method={method}")
    assert module.trainer.global_step == 1
    cfg = module.cfg
    assert (cfg.method, cfg.backbone.name, cfg.optimizer.name) == (method, "resnet18", "lars")
    # the recipe's numbers, not the plugin's
    assert cfg.method_kwargs.num_prototypes == 4096
    prototypes = module.head.last_layer
    assert (prototypes.num_prototypes, prototypes.normalization) == (4096, NORMALIZATION[method])
    assert (cfg.momentum.base_tau, cfg.optimizer.weight_decay) == (0.9995, 1e-6)
    assert cfg.optimizer.lr == pytest.approx(0.3 * 2 / 256)
    assert module.backbone.conv1.kernel_size == (3, 3)  # the host's network for 32 px
    (checkpoint,) = tmp_path.glob(f"trained_models/{method}/*/*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["dinovmf_plugin"]["cfg"]["method"] == method


@pytest.mark.parametrize("method", ["dino_vmf", "dino_multicrop"])
def test_dino_of_imagenet100__resnet18(run, method):
    module = run("imagenet-100/dino.yaml", f"method={method}", *SMALL)
    assert module.trainer.global_step == 1
    assert module.settings.warmup_teacher_temperature_epochs == 50
    assert module.head.last_layer.normalization == NORMALIZATION[method]


@pytest.mark.parametrize("method", NORMALIZATION)
def test_dino_of_imagenet100__vit(run, method):
    module = run("imagenet-100/dino_vit.yaml", f"method={method}", *SMALL)
    assert module.trainer.global_step == 1
    assert module.cfg.backbone.name == "vit_tiny"
    assert module.student_prototypes.normalization == NORMALIZATION[method]
    assert module.cfg.scheduler.warmup_start_lr == 1e-5
    assert "norm_last_layer" not in module.cfg.method_kwargs


@pytest.mark.parametrize("method", ["ibot", "ibot_vmf", "msn", "msn_vmf"])
def test_what_a_resnet_cannot_do__one_sentence(run, method):
    words = rf"backbone\.name='resnet18' cannot train {method}, which masks or drops single patches"
    with pytest.raises(ValueError, match=words) as caught:
        run("cifar/dino.yaml", f"method={method}")
    assert "\n" not in str(caught.value)


def test_method_written_in_the_file(run, tmp_path):
    source = CHECKOUT / "scripts/pretrain/cifar"
    folder = tmp_path / "mine"
    for name in ("augmentations/asymmetric.yaml", "wandb/private.yaml"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes((source / name).read_bytes())
    text = (source / "dino.yaml").read_text()
    assert text.count('method: "dino"') == 1
    (folder / "mine.yaml").write_text(text.replace('method: "dino"', 'method: "dino_vmf"'))
    module = run(folder / "mine.yaml", *SMALL)
    assert (module.trainer.global_step, module.cfg.method) == (1, "dino_vmf")


def test_the_hosts_own_dino__as_without_the_plugin(run):
    module = run("cifar/dino.yaml", *SMALL)
    assert module.trainer.global_step == 1
    assert type(module).__module__ == "solo.methods.dino"


def test_auto_resume__the_same_run_and_no_other(run, capsys):
    """cifar/dino.yaml resumes by itself; upstream would go on from another cell of an ablation."""
    first = run("cifar/dino.yaml", "method=dino_vmf", *SMALL)
    again = run("cifar/dino.yaml", "method=dino_vmf", *SMALL)
    assert "Resuming from previous checkpoint" in capsys.readouterr().out
    assert again.trainer.global_step == 1  # of 1: nothing was left to train
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    run("cifar/dino.yaml", "method=dino_vmf", *SMALL, "+method_kwargs.centering=logit")
    run("cifar/dino.yaml", "method=dino_vmf", *SMALL, "++auto_resume.max_hours=0")
    out = capsys.readouterr().out
    assert "Resuming" not in out
    assert "is older than auto_resume.max_hours=0: starting afresh" in out


def _printed(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return OmegaConf.create(done.stdout)


@pytest.mark.parametrize("method", ["dino_vmf", "simsiam"])
def test_command_line__method_is_accepted(method):
    config = ["--config-path", "scripts/pretrain/cifar/", "--config-name", "dino.yaml"]
    cfg = _printed(*config, f"method={method}", "--cfg", "job")
    theirs = _printed(*config, "--cfg", "job")
    theirs.method = method
    assert cfg == theirs


def test_dali_without_validation_images(run):
    """Upstream hands Lightning None: "An invalid dataloader was returned"."""
    pytest.importorskip("nvidia.dali")
    dali = ["data.format=dali", "+dali.device=cpu", "data.val_path=null"]
    module = run("imagenet-100/dino.yaml", "method=dino_vmf", *SMALL, *dali)
    assert module.trainer.global_step == 1
    assert sum(module.trainer.num_val_batches) == 0
