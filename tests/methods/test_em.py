"""Prototypes that EM moves: what the optimizer does not touch, training, starts, checkpoints, bad keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from dinovmf_plugin.checkpoints import load_head
from dinovmf_plugin.data.sampling import EpochPlan, ResumableLoader
from dinovmf_plugin.methods.em import starting_parameters
from dinovmf_plugin.training.folders import find_checkpoint

METHODS = ("dino_vmf", "ibot_vmf")
EM = {"method_kwargs.prototype_update": "em", "method_kwargs.num_prototypes": 8}


class Watch(Callback):
    """Losses, the layers and the random state of every step."""

    def __init__(self) -> None:
        self.losses, self.weights, self.states = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.states.append(torch.random.get_rng_state())
        self.weights.append(module.head.last_layer.weight_v.detach().clone())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(module.last_step.loss))


def _classes(make_crops: Any, steps: int) -> list[Any]:
    """Batches of four kinds of picture: what is common to a picture's crops can be learnt."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(4, 3, 4, 4, generator=generator)
    batches = []
    for step in range(steps):
        index, crops, labels = make_crops(batch=8, seed=step)
        kind = torch.arange(8) % 4
        crops = [
            0.3 * crop + F.interpolate(2 * pictures[kind], size=crop.shape[-2:]) for crop in crops
        ]
        batches.append([index, crops, labels])
    return batches


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps__finite_and_learning(small_cfg, make_crops, build, fit, method):
    cfg = small_cfg(
        method,
        max_epochs=1,
        **EM,
        **{"optimizer.lr": 3e-3, "backbone.kwargs.drop_path_rate": 0.0},
        **{"method_kwargs.init_prototypes": "em"},
    )
    module, watch = build(cfg), Watch()
    fit(module, _classes(make_crops, 20), callbacks=[watch])
    losses = torch.tensor(watch.losses)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean() - 0.05
    state = module.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    # components move in every step, for student and teacher at once, and differ from each other
    moved = [float((a - b).abs().max()) for a, b in zip(watch.weights, watch.weights[1:])]
    assert min(moved) > 0
    for name in ("weight_v", "weight_g"):
        student = state[f"head.last_layer.{name}"]
        assert torch.equal(student, state[f"momentum_head.last_layer.{name}"])
    assert float((student - 1).abs().max()) > 0.01
    counts = state["components.counts"]
    assert float((counts * student.squeeze(1)).sum() / counts.sum()) == pytest.approx(1, rel=1e-4)
    assert float(state["components.usage"].sum()) == pytest.approx(1, rel=1e-5)
    assert trainer_has_no_prototypes(module)


def trainer_has_no_prototypes(module: Any) -> bool:
    """Whether the optimizer holds no prototype."""
    held = {id(p) for g in module.trainer.optimizers[0].param_groups for p in g["params"]}
    return not held & {id(p) for p in module.head.last_layer.parameters()}


def test_step__uses_the_components_of_the_step_before(tiny_cfg, make_crops, build, fit):
    """Statistics are of this step's embeddings under the prototypes that made this step's targets."""
    cfg = tiny_cfg(max_epochs=1, **EM, **{"backbone.kwargs.drop_path_rate": 0.0})
    module = build(cfg)
    first = module.head.last_layer.directions().clone()
    fit(module, [make_crops(seed=3)])
    y = module.last_step.teacher_embeddings
    nearest = (y @ first.T).argmax(dim=1)
    sums = torch.zeros(8, 8).index_add_(0, nearest, y)
    # one batch of n rows weighs memory (1 - (1 - 1 / memory)^n)
    n = torch.bincount(nearest, minlength=8)
    mass = 64 * (1 - (1 - 1 / 64) ** n)
    torch.testing.assert_close(module.components.counts, mass, rtol=1e-4, atol=1e-5)
    used = n > 0
    torch.testing.assert_close(
        module.head.last_layer.directions()[used], F.normalize(sums[used], dim=1)
    )
    torch.testing.assert_close(module.head.last_layer.directions()[~used], first[~used])


def test_ibot__patches_of_an_image_weigh_as_its_cls_token(small_cfg, make_crops, build, fit):
    module = build(small_cfg("ibot_vmf", max_epochs=1, **EM, **{"method_kwargs.em_memory": 1e9}))
    fit(module, [make_crops(batch=4)])
    # two large crops of four images, and as much again for their patches
    assert float(module.components.counts.sum()) == pytest.approx(16, rel=1e-4)


def test_frozen_epochs__nothing_moves(tiny_cfg, make_crops, build, fit):
    cfg = tiny_cfg(max_epochs=2, **EM, **{"method_kwargs.freeze_last_layer": 1})
    module, watch = build(cfg), Watch()
    fit(module, [make_crops(seed=s) for s in range(3)], callbacks=[watch])
    assert all(torch.equal(w, watch.weights[0]) for w in watch.weights[:4])
    assert not torch.equal(watch.weights[4], watch.weights[0])


# ---- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "em"])
@pytest.mark.parametrize("how", ["kmeans", "em"])
def test_init__from_the_data__training_draws_what_it_would_have(
    tiny_cfg, make_crops, build, fit, update, how
):
    batches = _classes(make_crops, 6)
    seen = {}
    for start in ("random", how):
        more = {"method_kwargs.prototype_update": update, "method_kwargs.init_prototypes": start}
        cfg = tiny_cfg(max_epochs=1, **{"method_kwargs.num_prototypes": 4}, **more)
        seen[start] = Watch()
        module = build(cfg)
        teacher = [
            F.normalize(module.momentum_head(module.pooled_teacher(b[1][:2])), dim=1)
            for b in batches
        ]
        fit(module, batches, callbacks=[seen[start]])
    assert torch.equal(seen["random"].states[0], seen[how].states[0])
    y = torch.cat(teacher).detach()
    cosine = {
        start: float((y @ F.normalize(watch.weights[0], dim=1).T).max(dim=1).values.mean())
        for start, watch in seen.items()
    }
    assert cosine[how] > 0.9
    assert cosine[how] > cosine["random"] + 0.1


class Loader(ResumableLoader):
    """Batches of the plugin's order, which a loader that is left early or used up must not change."""

    def __init__(self, make_crops: Any) -> None:
        super().__init__(EpochPlan(num_samples=40, batch_size=8, seed=0))
        self.make_crops = make_crops

    def _batches(self, epoch: int, start: int) -> Any:
        for indices in self.plan.indices(epoch)[start:]:
            _, crops, labels = self.make_crops(batch=8, seed=int(indices.sum()))
            yield [torch.from_numpy(indices.copy()), crops, labels]


class Indexes(Callback):
    """Which images came, by epoch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, batch[0].tolist()))


@pytest.mark.parametrize("rows", [20, 10_000], ids=["part of an epoch", "all of it"])
def test_init__the_loader_then_starts_with_its_first_batch(
    tiny_cfg, make_crops, build, fit, monkeypatch, rows
):
    monkeypatch.setattr("dinovmf_plugin.methods.em.initialization_rows", lambda num: rows)
    seen = []
    for start in ("random", "kmeans"):
        more = {"method_kwargs.num_prototypes": 4, "method_kwargs.init_prototypes": start}
        watch = Indexes()
        fit(build(tiny_cfg(max_epochs=2, **more)), Loader(make_crops), callbacks=[watch])
        seen.append(watch.seen)
    assert [epoch for epoch, _ in seen[0]] == [0] * 5 + [1] * 5
    assert seen[0] == seen[1]


def test_init__magnitudes__follow_the_concentrations(tiny_cfg, make_crops, build, fit):
    more = {"method_kwargs.init_prototypes": "em", "method_kwargs.num_prototypes": 4}
    cfg = tiny_cfg(max_epochs=1, **more, **{"optimizer.lr": 0.0})
    module = build(cfg)
    fit(module, _classes(make_crops, 6))
    magnitudes = module.head.last_layer.magnitudes()
    assert float(magnitudes.std()) > 0.01
    torch.testing.assert_close(module.momentum_head.last_layer.magnitudes(), magnitudes)


def test_init__too_few_embeddings__named(tiny_cfg, make_crops, build, fit):
    more = {"method_kwargs.init_prototypes": "kmeans", "method_kwargs.num_prototypes": 100}
    with pytest.raises(
        ValueError, match=r"init_prototypes=kmeans starts 100 .* there are 8: reduce"
    ):
        fit(build(tiny_cfg(max_epochs=1, **more)), [make_crops()])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision__components_stay_exact(tiny_cfg, make_crops, build, fit, precision):
    more = {"method_kwargs.init_prototypes": "em", "method_kwargs.num_prototypes": 4}
    module = build(tiny_cfg(max_epochs=1, **(EM | more)))
    fit(module, _classes(make_crops, 4), precision=precision)
    for value in module.components.buffers():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    # rows of the start, and of four batches of eight pictures with two large crops
    assert float(module.components.counts.sum()) > 4
    assert torch.isfinite(module.last_step.loss)
    layers = module.head.last_layer, module.momentum_head.last_layer
    assert torch.equal(layers[0].weight_v, layers[1].weight_v)


def test_starting_parameters__many_components__all_different():
    torch.manual_seed(0)
    y = F.normalize(torch.randn(2000, 8), dim=1)
    found = starting_parameters(y, 300, "em", seed=0)
    assert float(found.counts.sum()) == pytest.approx(2000)
    directions = F.normalize(found.sums, dim=1)
    assert float((directions @ directions.T).fill_diagonal_(0).max()) < 0.9999


# ---- checkpoints and keys ------------------------------------------------------------------------


def test_checkpoint__is_read_as_one_of_trained_prototypes(
    tiny_cfg, crop_loader, build, fit, tmp_path
):
    more = {"checkpoint.enabled": True, "checkpoint.dir": str(tmp_path)}
    module = build(tiny_cfg(max_epochs=1, **EM, **more))
    fit(module, crop_loader(3))
    path = find_checkpoint(module.cfg)
    head, settings = load_head(path)
    layer = module.momentum_head.last_layer
    torch.testing.assert_close(head.last_layer.directions(), layer.directions())
    torch.testing.assert_close(head.last_layer.magnitudes(), layer.magnitudes())
    assert settings.normalization == "vmf"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {n for n in state if n.startswith("components.")} == {
        f"components.{name}" for name in ("counts", "sums", "usage", "rows")
    }
    other = build(tiny_cfg(max_epochs=2, **more, **{"method_kwargs.num_prototypes": 8}))
    with pytest.raises(ValueError, match="prototype_update='gradient' differs"):
        fit(other, crop_loader(3), ckpt_path=path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prototype_update": "sgd"}, "prototype_update"),
        ({"em_memory": 0.5, "prototype_update": "em"}, "em_memory"),
        ({"em_memory": 100.0}, "em_memory=100.0 has no meaning with prototype_update=gradient"),
        (
            {"prototype_update": "em", "normalization": "l2"},
            "prototype_update=em has no meaning with normalization=l2",
        ),
        (
            {"prototype_update": "em", "prototype_spread": 0.1},
            "prototype_spread=0.1 has no meaning with prototype_update=em",
        ),
        (
            {"init_prototypes": "em", "init_from": "weights.pth"},
            "init_prototypes=em has no meaning with init_from",
        ),
    ],
)
def test_settings__named_before_training(tiny_cfg, build, more, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_cfg(**{f"method_kwargs.{key}": value for key, value in more.items()}))
