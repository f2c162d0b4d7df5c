import json
import math
import pickle

import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints.layouts import read_weights
from dinovmf_plugin.core.distributed import Processes
from dinovmf_plugin.data.loaders import leave_signals_to_the_parent
from dinovmf_plugin.evaluation.finetuning.run import classification_scores, finetune
from dinovmf_plugin.evaluation.finetuning.settings import FinetuneSettings
from dinovmf_plugin.evaluation.finetuning.trainer import (
    FineTuner,
    build_classifier,
    training_loader,
)
from dinovmf_plugin.features.images import image_folder

CPU = torch.device("cpu")


def _settings(**changes):
    values = {
        "epochs": 6,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_epochs": 2,
        "min_lr": 1e-5,
        "warmup_lr": 1e-4,
        "resize": 24,
        "crop_size": 24,
    }
    return FinetuneSettings(**(values | changes))


def _build(vit_file, **changes):
    values = {"img_size": 24, "drop_path": 0.3, "init_scale": 0.001, "seed": 1}
    return build_classifier(read_weights(vit_file), 4, **(values | changes))


def _tuner(vit_file, settings, steps=5, **kwargs):
    return FineTuner(_build(vit_file), settings, 1e-3, 4, steps, CPU, **kwargs)


def test_the_backbone_is_loaded_and_the_classifier_starts_small(vit_file):
    model = _build(vit_file)
    stored = torch.load(vit_file, weights_only=True)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in stored.items())
    assert set(own) - set(stored) == {"head.weight", "head.bias"}
    assert 0 < own["head.weight"].abs().max() < 1e-3
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.3])  # rising linearly
    images = torch.randn(2, 3, 24, 24)
    reference = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0
    )
    reference.load_state_dict(stored)
    with torch.no_grad():
        cls = reference.eval()(images)  # CLS after the final norm
        expected = cls @ own["head.weight"].T + own["head.bias"]
        torch.testing.assert_close(model.eval()(images), expected)


def test_another_resolution_resamples_the_positions(vit_file):
    model = _build(vit_file, img_size=48)
    assert model.pos_embed.shape == (1, 37, 192)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 4)


def test_from_scratch():
    model = build_classifier(
        "random:vit_tiny_patch16_224", 3, img_size=32, drop_path=0.1, init_scale=1.0
    )
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_layer_decay_and_weight_decay_groups(vit_file):
    tuner = _tuner(vit_file, _settings(layer_decay=0.5))
    of = {}
    names = {id(p): name for name, p in tuner.model.named_parameters()}
    for group in tuner.optimizer.param_groups:
        for parameter in group["params"]:
            of[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    # embeddings, 2 blocks, norm and head: the head learns at the full rate, each step below at half
    assert of["head.weight"] == (1.0, 0.05)
    assert of["blocks.1.mlp.fc1.weight"] == (0.5, 0.05)
    assert of["blocks.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert of["patch_embed.proj.weight"] == (0.125, 0.05)
    for name in ("cls_token", "pos_embed", "blocks.0.norm1.weight", "head.bias"):
        assert of[name][1] == 0.0


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("per_epoch", [True, False])
def test_learning_rate(vit_file, prefix, per_epoch):
    """Warm-up, then a cosine that starts after the warm-up (BEiT) or under it (DeiT)."""
    settings = _settings(
        warmup_prefix=prefix, step_on_epochs=per_epoch, layer_decay=0.5, epochs=4, warmup_epochs=1
    )
    steps = 2
    tuner = _tuner(vit_file, settings, steps)
    head = next(g for g in tuner.optimizer.param_groups if g["lr_scale"] == 1.0)
    embed = next(g for g in tuner.optimizer.param_groups if g["lr_scale"] == 0.125)

    class Loader(list):
        sampler = type("S", (), {"set_epoch": staticmethod(lambda epoch: None)})

    loader = Loader([(torch.randn(2, 3, 24, 24), torch.arange(2))] * steps)
    unit = 1 if per_epoch else steps
    for epoch in range(settings.epochs):
        for step, _ in enumerate(tuner.train_epoch(loader, epoch)):
            t = epoch if per_epoch else epoch * steps + step
            warm, total = unit, 4 * unit
            if t < warm:
                expected = 1e-4 + (1e-3 - 1e-4) * t / warm
            else:
                x = (t - warm) / (total - warm) if prefix else t / total
                expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * x)) / 2
            assert head["lr"] == pytest.approx(expected)
            assert embed["lr"] == pytest.approx(0.125 * expected)


def test_mixing_clipping_and_ema_reach_the_update(vit_file, monkeypatch):
    seen = []

    def spy(logits, targets, label_smoothing):
        seen.append((targets.detach().clone(), label_smoothing))
        return torch.nn.functional.log_softmax(logits, 1).mul(-1).mean()

    monkeypatch.setattr("dinovmf_plugin.evaluation.finetuning.trainer.F.cross_entropy", spy)
    settings = _settings(ema_decay=0.5, clip_grad=1e-9, weight_decay=0.0, layer_decay=None)
    tuner = _tuner(vit_file, settings)

    class Loader(list):
        sampler = type("S", (), {"set_epoch": staticmethod(lambda epoch: None)})

    for group in tuner.optimizer.param_groups:
        group["eps"] = 1.0  # so that a clipped gradient means a tiny step
    before = {name: value.clone() for name, value in tuner.model.state_dict().items()}
    loader = Loader([(torch.randn(4, 3, 24, 24), torch.arange(4))])
    assert [count for count, _ in tuner.train_epoch(loader, 0)] == [4]
    targets, smoothing = seen[0]
    assert targets.shape == (4, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert 0 < targets.min() < 0.1  # smoothed
    assert smoothing == 0.0
    after = tuner.model.state_dict()
    moved = max(float((after[n] - before[n]).abs().max()) for n in before)
    assert moved < 1e-10  # clipped to nothing
    averaged = tuner.ema.module.state_dict()
    for name in before:
        torch.testing.assert_close(averaged[name], 0.5 * before[name] + 0.5 * after[name])


def test_without_mixing_labels_are_smoothed_by_the_loss(vit_file, folders):
    settings = _settings(mixup=0.0, cutmix=0.0, smoothing=0.2, auto_augment=None, erasing=0.0)
    tuner = _tuner(vit_file, settings)
    loader = training_loader(
        image_folder(str(folders[0]), "data.train_path"), settings, Processes(), 0, seed=0
    )
    assert len(loader) == 6
    losses = [loss for _, loss in tuner.train_epoch(loader, 0)]
    # the classifier starts at nearly zero: every target costs log 4
    assert losses[0] == pytest.approx(math.log(4), abs=0.02)


def test_repeated_augmentation_repeats(folders):
    images = image_folder(str(folders[0]), "data.train_path")
    settings = _settings(repeated_aug=3)
    rows = list(training_loader(images, settings, Processes(), 0, seed=0).sampler)
    assert len(rows) == 48
    assert len(set(rows)) == 16
    plain = list(training_loader(images, _settings(), Processes(), 0, seed=0).sampler)
    assert sorted(plain) == list(range(48))


def test_an_epoch_without_a_batch_is_refused(make_folder):
    """timm's sampler draws a multiple of 256 images: 300 leave no batch of 300, which divided by zero."""
    images = image_folder(str(make_folder(75, size=4)), "data.train_path", check_images="none")
    repeated = _settings(repeated_aug=3, batch_size=300)
    with pytest.raises(
        ValueError, match=r"batch_size=300 exceeds the 256 images .* draws of 300: use at most 256"
    ):
        training_loader(images, repeated, Processes(), 0, seed=0)
    fits = _settings(repeated_aug=3, batch_size=256)
    assert len(training_loader(images, fits, Processes(), 0, seed=0)) == 1
    assert len(training_loader(images, _settings(batch_size=300), Processes(), 0, seed=0)) == 1


def test_workers_start_as_those_of_the_evaluations(folders, monkeypatch):
    """Not by forking beside DALI's threads; and they leave signals to the parent."""
    monkeypatch.setattr(
        "dinovmf_plugin.evaluation.finetuning.trainer.worker_start_method",
        lambda n: "spawn" if n else None,
    )
    images = image_folder(str(folders[0]), "data.train_path")
    loader = training_loader(images, _settings(), Processes(), 2, seed=0)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.worker_init_fn is leave_signals_to_the_parent
    sent = pickle.loads(pickle.dumps(loader.dataset))  # noqa: S301  (as a worker gets it)
    assert sent[5][0].shape == (3, 24, 24)
    assert training_loader(images, _settings(), Processes(), 0, 0).multiprocessing_context is None


def test_random_magnitudes_may_remove_every_bit(folders):
    """Pillow 13 refuses to posterise to 0 bits, which the recipes' RandAugment asks for now and then."""
    images = image_folder(str(folders[0]), "data.train_path")
    settings = _settings(auto_augment="rand-m10-n15-inc1", erasing=0.0)
    dataset = training_loader(images, settings, Processes(), 0, seed=0).dataset
    (randaugment,) = (step for step in dataset.transform.transforms if hasattr(step, "ops"))
    operation = next(op for op in randaugment.ops if op.name.startswith("Posterize"))
    operation.prob = 1.0
    gray = Image.new("RGB", (8, 8), (90, 200, 10))
    assert operation(gray).getextrema() == ((0, 0), (0, 0), (0, 0))  # no bit is left
    operation.magnitude = 5.0  # two bits
    assert operation(gray).getpixel((0, 0)) == (90 & 0xC0, 200 & 0xC0, 10 & 0xC0)
    for i in range(len(dataset)):  # 15 operations each: all of them run
        assert dataset[i][0].shape == (3, 24, 24)


def test_a_loss_that_is_not_finite_stops(vit_file, folders):
    tuner = _tuner(vit_file, _settings())
    torch.nn.init.constant_(tuner.model.head.weight, float("inf"))
    loader = training_loader(
        image_folder(str(folders[0]), "data.train_path"), _settings(), Processes(), 0, seed=0
    )
    with pytest.raises(
        ValueError, match=r"the loss is (nan|inf) in epoch 1, step 1: lower finetune.lr"
    ):
        list(tuner.train_epoch(loader, 0))


def test_scores():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3, 2, 1, 0, -1, -2], [0, 9, 0, 0, 0, 0]])
    found = classification_scores(logits, torch.tensor([0, 5, 1]))
    assert found["top1"] == pytest.approx(200 / 3)
    assert found["top5"] == pytest.approx(200 / 3)
    assert found["mean_per_class"] == pytest.approx(200 / 3)


SMALL = [
    "finetune.resize=24",
    "finetune.crop_size=24",
    "finetune.batch_size=16",
    "finetune.warmup_epochs=1",
    "finetune.ema_decay=0.9",
    "finetune.drop_path=0",
    "finetune.auto_augment=null",
    "finetune.erasing=0",
    "finetune.mixup=0",
    "finetune.cutmix=0",
    "finetune.layer_decay=null",
]


def _epochs(result):
    return [run["epochs"] for run in result["runs"]]


def test_a_sweep_learns_resumes_exactly_and_reports_the_best(
    compose, run_overrides, tmp_path, monkeypatch, capsys
):
    overrides = [*run_overrides, *SMALL, "finetune.epochs=4", "finetune.lr=[1e-6,0.002]"]
    whole = finetune(compose("finetune", *overrides))
    assert "img/s" not in capsys.readouterr().err  # progress=false
    assert [run["lr"] for run in whole["runs"]] == [1e-6, 0.002]
    assert whole["best"]["top1"] == max(e["top1"] for run in whole["runs"] for e in run["epochs"])
    first, last = whole["runs"][1]["epochs"][0]["loss"], whole["runs"][1]["last"]["loss"]
    assert last < 0.9 * first  # it learns
    assert whole["runs"][0]["last"]["loss"] > last  # and the tiny rate less
    assert set(whole["best"]) >= {"top5", "mean_per_class", "ema", "loss", "epoch"}
    out = tmp_path / "out"
    assert json.loads((out / "finetune.json").read_text())["best"] == whole["best"]
    assert "paper (ImageNet)" in (out / "finetune.html").read_text()
    assert (out / "finetune_lr0.002" / "best.safetensors").is_file()

    # stopped after two epochs of the second rate, then started again
    calls = []

    def stop(self, loader, epoch, train_epoch=FineTuner.train_epoch):
        calls.append(epoch)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return train_epoch(self, loader, epoch)

    again = [*overrides, f"output_dir={tmp_path / 'again'}"]
    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(compose("finetune", *again))
    assert calls == [0, 1, 2, 3, 0, 1, 2]
    assert _epochs(finetune(compose("finetune", *again))) == _epochs(whole)
    # other settings must not go on with these weights
    with pytest.raises(ValueError, match=r"of other settings \(smoothing was 0.1, is now 0.5\)"):
        finetune(compose("finetune", *again, "finetune.smoothing=0.5"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.batch_size=64", "batch_size=64 exceeds the 48 training images"),
        ("checkpoint=nothing.pth", "no checkpoint file nothing.pth"),
        ("checkpoint=random:nonsense", "random:nonsense names no Vision Transformer of timm"),
        ("finetune.epochs=2.5", "finetune.epochs=2.5 must be a whole number"),
        ("finetune.lr=high", "finetune.lr='high' must be a number above 0 or a list of"),
        ("finetune.warmup_epochs=9", "warmup_epochs=9 must be"),
        ("data.val_path=null", "data.val_path=None must be set"),
    ],
)
def test_bad_input_is_refused(compose, run_overrides, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(compose("finetune", *run_overrides, *SMALL, "finetune.epochs=2", override))
