"""What a machine, a file or a spelling lacks is one sentence, before a step is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinovmf_plugin import host
from dinovmf_plugin.pretraining import build_method, pretrain
from dinovmf_plugin.runs.cli import is_expected
from dinovmf_plugin.training.config import parse_cfg
from tests.small_demo import small_demo


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (root / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> Any:
    def make(*overrides: str) -> Any:
        given = [
            f"data.train_path={pictures}",
            f"checkpoint.dir={tmp_path / 'runs'}",
            "max_epochs=1",
            "scheduler.warmup_epochs=0",
        ]
        return small_demo(*given, *overrides)

    return make


def _sentence(cfg: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        pretrain(cfg)
    message = str(error.value)
    assert is_expected(error.value)
    assert "\n" not in message.strip()
    assert message.strip()
    return message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "backbone.name=vit_smal",
            "backbone.name='vit_smal' is not in the solo-learn .* vit_small",
        ),
        (
            "+backbone.kwargs.in_chans=1",
            r"backbone\.kwargs\.in_chans=1 is not supported: images are RGB",
        ),
        (
            "+backbone.kwargs.strict_size=1",
            r"backbone\.kwargs\.strict_size=1 is not supported: no stored weight",
        ),
        ("+optimizer.kwargs.betas=[0.9]", r"optimizer\.kwargs=.*0\.9.* is refused by .*=adamw: "),
        ("accelerator=cuda0", "accelerator"),
        ("precision=17", "precision='?17"),
        (
            "+optimizer.kwargs.bta=[0.9,0.95]",
            r"optimizer\.kwargs\.bta is no argument .* mean betas\?",
        ),
    ],
)
def test_spelling__named(recipe, override, words):
    with pytest.raises(ValueError, match=words):
        pretrain(recipe(override))
    assert "\n" not in _sentence(recipe(override))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu__one_key_and_the_reason(recipe):
    message = _sentence(recipe("accelerator=gpu"))
    assert (
        message == "Lightning's Trainer refuses accelerator='gpu': No supported gpu backend found!"
    )


def test_backbones__those_that_the_host_builds():
    assert {"resnet18", "vit_tiny", "vit_nano", "swin_tiny"} <= set(host.BACKBONES)
    assert ("convnext_tiny" in host.BACKBONES) == (host.GENERATION == "main")


def test_odd_crops_of_swin__named(recipe):
    drop = [
        f"~backbone.kwargs.{key}" for key in ("patch_size", "drop_path_rate", "dynamic_img_size")
    ]
    cfg = recipe("method=dino_vmf", "backbone.name=swin_tiny", "backbone.kwargs.img_size=32", *drop)
    message = _sentence(cfg)
    assert "does not take crops of 16 x 16 px" in message or "cannot be built" in message


def test_build_method__trial_crops_leave_no_trace(recipe):
    """Neither a statistic of batch normalization, nor a mode, nor the random stream."""
    cfg = parse_cfg(recipe("method_kwargs.use_bn_in_head=True"))
    torch.manual_seed(0)
    model = build_method(cfg)
    after = torch.rand(1)
    counts = [v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert not any(int(count) for count in counts)
    assert model.training
    assert model.backbone.training
    torch.manual_seed(0)
    again = build_method(cfg)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(
        again.backbone.patch_embed.proj.weight, model.backbone.patch_embed.proj.weight
    )
