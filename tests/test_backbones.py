"""What trains can be evaluated, analyzed, exported and resumed, or is refused: docs/backbones.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from PIL import Image

from dinovmf_plugin import host
from dinovmf_plugin.analysis.run import AnalysisSettings, analyze
from dinovmf_plugin.checkpoints.transfer import export_weights
from dinovmf_plugin.core.vit import forward_tokens, last_attention
from dinovmf_plugin.data.decoding import open_image
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.evaluation.retrieval.descriptors import global_descriptor
from dinovmf_plugin.features.extraction import backbone_features, resolve_feature
from dinovmf_plugin.features.network import load_network, untrained_like
from dinovmf_plugin.pretraining import build_method, pretrain
from dinovmf_plugin.runs.settings import read
from dinovmf_plugin.training.config import parse_cfg
from tests.small_demo import small_demo

REGISTERS = {"reg_tokens": 4}
VITS: dict[str, dict[str, Any]] = {
    "registers": REGISTERS,
    "registers, positions of patches alone": {**REGISTERS, "no_embed_class": True},
    "positions of patches alone": {"no_embed_class": True},
    "normalized queries and keys": {"qk_norm": True},
    "LayerScale": {"init_values": 0.1},
    "norm before the blocks": {"pre_norm": True},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("resnet18", {}),
    "ResNet, CIFAR stem": ("resnet18", {}),
    "ConvNeXt": ("convnext_tiny", {}),
    "Swin": ("swin_tiny", {"img_size": 32, "window_size": 4}),
}
METHODS = ("dino_vmf", "ibot_vmf", "msn_vmf")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _recipe(
    folder: Path, method: str, *more: str, name: str = "vit_nano", kwargs: Any = None
) -> Any:
    data = folder / "images" / "a"
    if not data.exists():
        data.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(
                data / f"{i}.png"
            )
    given = [
        f"method={method}",
        f"data.train_path={data.parent}",
        f"checkpoint.dir={folder / 'runs'}",
        "max_epochs=1",
        "scheduler.warmup_epochs=0",
        "auto_resume.enabled=True",
    ]
    if method.startswith("msn"):
        given += [f"~method_kwargs.warmup_teacher_temperature{end}" for end in ("", "_epochs")]
    cfg = small_demo(*given, *more)
    cfg.backbone = {"name": name, "kwargs": {"patch_size": 8, "img_size": 32, **kwargs}}
    if name != "vit_nano":
        cfg.backbone.kwargs = kwargs
    if name.startswith(("swin", "convnext")):  # a network of one size, and one for 32 px at least
        cfg.augmentations = [crop for crop in cfg.augmentations if crop.crop_size == 32]
    return cfg


class Keep(Callback):
    """The teacher of a training, as its own timm class computes it."""

    teacher: Any = None

    def on_train_end(self, trainer, module) -> None:
        self.teacher = module.momentum_backbone.eval()


_TRAINED: dict[str, Any] = {}


@pytest.fixture
def trained(tmp_path_factory):
    """(recipe, checkpoint, teacher) of a network; every cell of its row looks at the same training."""

    def train(row: str, method: str = "dino_vmf") -> tuple[Any, Path, Any]:
        if (row, method) not in _TRAINED:
            name, kwargs = OTHERS[row] if row in OTHERS else ("vit_nano", VITS[row])
            if name not in host.BACKBONES:
                pytest.skip(f"{name} is not in this generation of solo-learn")
            folder = tmp_path_factory.mktemp("run")
            keep = Keep()
            cfg = _recipe(folder, method, name=name, kwargs=kwargs)
            if "CIFAR" in row:
                path, keep.teacher = _untrained(cfg, folder)
            else:
                path = pretrain(cfg, callbacks=[keep])
            _TRAINED[row, method] = cfg, path, keep.teacher
        return _TRAINED[row, method]

    return train


def _untrained(cfg: Any, folder: Path) -> tuple[Path, Any]:
    """A checkpoint of the network that the host makes for CIFAR's data, which are not here."""
    cfg.data.dataset = "cifar10"
    model = build_method(parse_cfg(cfg))
    content = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6"}
    model.on_save_checkpoint(content)
    torch.save(content, folder / "last.ckpt")
    assert model.backbone.conv1.kernel_size == (3, 3)
    return folder / "last.ckpt", model.momentum_backbone.eval()


def _images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("row", VITS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_vit__evaluated(trained, row, method):
    """[C], [D], patches of other sizes, and attention: those of the teacher that was trained."""
    _, path, teacher = trained(row, method)
    network = load_network(path, head=True)
    prefix = 1 + VITS[row].get("reg_tokens", 0)
    wanted = teacher.forward_features(_images())
    assert wanted.shape[1] == prefix + 16
    torch.testing.assert_close(forward_tokens(network.vit, _images()), wanted, **CLOSE)
    specs = [resolve_feature(f, network.model) for f in ("cls", {"avgpool": True}, "dino")]
    cls, pooled, dino = backbone_features(network.model, _images(), specs)
    torch.testing.assert_close(cls, wanted[:, 0], **CLOSE)
    torch.testing.assert_close(pooled[:, 128:], wanted[:, prefix:].mean(1), **CLOSE)
    assert dino.shape == (2, 4 * 128)
    torch.testing.assert_close(dino[:, -128:], wanted[:, 0], **CLOSE)
    assert forward_tokens(network.vit, _images(24))[:, prefix:].shape == (2, 9, 128)

    seen = []
    attention = teacher.blocks[-1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda *a: seen.append(a[2]))
    teacher.forward_features(_images())
    handle.remove()
    torch.testing.assert_close(last_attention(network.vit, _images()), seen[0], **CLOSE)


@pytest.mark.parametrize("row", OTHERS)
@torch.no_grad()
def test_other_network__evaluated(trained, row):
    """The pooled output, also where a head, its untrained twin or a descriptor is asked for."""
    _, path, teacher = trained(row)
    network = load_network(path, head=True)
    wanted = teacher(_images())
    feature = resolve_feature("cls", network.model)
    (found,) = backbone_features(network.model, _images(), [feature])
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert network.image_size == 32
    descriptor = global_descriptor(network.model, _images())
    torch.testing.assert_close(descriptor, torch.nn.functional.normalize(wanted, dim=1), **CLOSE)
    head, settings = network.mixture_head
    assert head(found).shape == (2, 8)
    assert settings.normalization == "vmf"
    twin = untrained_like(network, seed=5).model(_images())  # not the seed of the training
    assert twin.shape == wanted.shape
    assert not torch.allclose(twin, wanted, atol=1e-3)
    with pytest.raises(ValueError, match="has no patch tokens: a Vision Transformer is needed"):
        _ = network.vit


@pytest.mark.parametrize("row", [*VITS, *OTHERS])
@torch.no_grad()
def test_exported(trained, tmp_path, row):
    _, path, teacher = trained(row)
    if "CIFAR" in row:
        with pytest.raises(
            ValueError, match=r"CIFAR stem\), which no name of timm builds"
        ) as error:
            export_weights(path, tmp_path)
        assert "\n" not in str(error.value)
        return
    report, _ = export_weights(path, tmp_path, with_projection_head=True, torchscript=True)
    assert (report.missing, report.unexpected) == ((), ())
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    wanted = teacher(_images())
    torch.testing.assert_close(model(_images()), wanted, **CLOSE)
    traced = torch.jit.load(str(tmp_path / "model.torchscript.pt"))
    torch.testing.assert_close(traced(_images()), wanted, **CLOSE)
    again = load_network(tmp_path, head=True)
    torch.testing.assert_close(again.model(_images()), wanted, **CLOSE)
    assert again.image_size == 32


_QUICK = ("registers", "ResNet, CIFAR stem")  # the drawing of one analysis takes seconds


@pytest.mark.parametrize(
    "row",
    [
        row if row in _QUICK else pytest.param(row, marks=pytest.mark.slow)
        for row in (*VITS, *OTHERS)
    ],
)
@torch.no_grad()
def test_analyzed(trained, tmp_path, row):
    """The whole analysis: every image's cosine with its component is the teacher's; attention of ViTs."""
    cfg, path, teacher = trained(row)
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        given = [f"checkpoint={path}", f"data.train_path={cfg.data.train_path}"]
        given += [f"output_dir={tmp_path / 'out'}", "data.num_workers=0", "device=cpu"]
        given += ["gallery.components=1", "gallery.images=1", "gallery.outliers=1"]
        given += ["attention.images=1", "utilization.thresholds=[0.9]"]
        settings = read(AnalysisSettings, compose("analyze", overrides=given))
    result = analyze(settings)
    assert (result["num_prototypes"], result["crop_size"]) == (32, 32)
    assert bool(result["attention"]) is (row in VITS)
    network = load_network(path, head=True)
    transform = network.normalized(CenterCrop(resize=37, size=32))
    with open(tmp_path / "out" / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    head, _ = network.mixture_head
    pixels = torch.stack([transform(open_image(Path(line["path"]))) for line in rows])
    output = teacher.forward_features(pixels)[:, 0] if row in VITS else teacher(pixels)
    directions = head.last_layer.directions()[[int(line["component"]) for line in rows]]
    cosines = (head(output) * directions).sum(1)
    found = torch.tensor([float(line["cosine"]) for line in rows])
    torch.testing.assert_close(found, cosines, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", [row for row in (*VITS, *OTHERS) if "CIFAR" not in row])
def test_resumed(trained, row):
    cfg, path, _ = trained(row)
    more = cfg.copy()
    more.max_epochs, more.resume_from_checkpoint = 2, str(path)
    final = pretrain(more)
    before, after = (torch.load(p, weights_only=True) for p in (path, final))
    assert (before["global_step"], after["global_step"]) == (1, 2)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "vit_nano",
            {"class_token": False, "global_pool": "avg"},
            "kwargs.class_token=False is not",
        ),
        ("vit_nano", {"global_pool": "avg"}, "kwargs.global_pool='avg' is not supported"),
        ("vit_nano", {"mlp_layer": "swiglu"}, "kwargs.mlp_layer='swiglu' is not supported"),
        ("vit_nano", {"pos_embed": "none"}, "kwargs.pos_embed='none' is not supported"),
        ("resnet18", {"groups": 2}, "kwargs.groups=2 is not supported with backbone.name=resnet18"),
        ("wide_resnet28w2", {}, "backbone.name='wide_resnet28w2' is not"),
        ("poolformer_s12", {}, "backbone.name='poolformer_s12' is not"),
    ],
)
def test_refused__one_sentence_before_training(tmp_path, name, kwargs, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        pretrain(_recipe(tmp_path, "dino_vmf", name=name, kwargs=kwargs))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.ckpt"))
