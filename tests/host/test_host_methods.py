"""The host's own methods still build and train, on today's Lightning, through the plugin's runner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from dinovmf_plugin import host

METHOD_KWARGS: dict[str, dict[str, Any]] = {
    "simclr": {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2},
    "byol": {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16},
    "dino": {
        "proj_hidden_dim": 16,
        "proj_output_dim": 8,
        "num_prototypes": 24,
        "use_bn_in_head": False,
        "norm_last_layer": True,
        "clip_grad": 0.3,
        "freeze_last_layer": 1,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "warmup_teacher_temperature": 0.04,
        "warmup_teacher_temperature_epochs": 1,
    },
}
CHANGES = {"data.num_small_crops": 0, "scheduler.interval": "step", "momentum.base_tau": 0.5}


class States(Callback):
    """The state before and after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))


@pytest.mark.parametrize(
    ("method", "backbone"), [("simclr", "vit_tiny"), ("byol", "resnet18"), ("dino", "vit_tiny")]
)
def test_own_method__trains_and_validates(tiny_cfg, make_crops, build, fit, method, backbone):
    changes = {**CHANGES, "backbone.name": backbone, "method_kwargs": METHOD_KWARGS[method]}
    if backbone == "resnet18":
        changes["backbone.kwargs"] = {}
    module = build(tiny_cfg(method, max_epochs=2, **changes))
    assert type(module).__name__.lower() == method
    assert isinstance(module, host.METHODS[method])
    states = States()
    batches = [make_crops(small=0, seed=seed) for seed in range(2)]
    val = [(batches[0][1][0], batches[0][2]), (batches[1][1][0][:3], batches[1][2][:3])]
    trainer = fit(module, batches, val, callbacks=[states])
    assert trainer.global_step == 4
    metrics = trainer.callback_metrics
    assert 0 <= metrics["val_acc1"].item() <= 100
    assert bool(torch.isfinite(metrics["val_loss"]))
    before, after = states.states
    names = ["classifier.weight"]
    names += [n for n in after if n.endswith(("blocks.0.mlp.fc1.weight", "layer1.0.conv1.weight"))]
    # 1.0.2 says encoder and momentum_encoder; its momentum methods must move both
    assert len(names) == (2 if method == "simclr" else 3)
    for name in names:
        assert not torch.equal(before[name], after[name]), name


def test_own_method__online_knn_of_the_config(tiny_cfg, make_crops, build, fit):
    cfg = tiny_cfg(
        "simclr",
        max_epochs=1,
        **CHANGES,
        **{
            "method_kwargs": METHOD_KWARGS["simclr"],
            "knn_eval.enabled": True,
            "knn_eval.k": 1,
            "knn_eval.distance_func": "cosine",
            "optimizer.lr": 0.0,
            "backbone.kwargs.drop_path_rate": 0.0,
        },
    )
    module = build(cfg)
    assert (module.knn.k, module.knn.distance_fx) == (1, "cosine")
    batch = make_crops(small=0, batch=6)
    trainer = fit(module, [batch], [(batch[1][0], batch[2])])
    assert trainer.callback_metrics["val_knn_acc1"].item() == 100


def test_own_dino__clips_by_parameter_and_lightning_by_norm(tiny_cfg, make_crops, build, fit):
    """1.0.2's DINO has a ``clip_gradients(clip)`` where Lightning has ``clip_gradients(optimizer, ...)``."""
    changes = {**CHANGES, "method_kwargs": {**METHOD_KWARGS["dino"], "clip_grad": 1e-4}}
    norms = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            network = getattr(module, "backbone", None) or module.encoder
            norms.extend(p.grad.norm().item() for p in network.parameters() if p.grad is not None)

    module = build(tiny_cfg("dino", max_epochs=1, **changes))
    fit(module, [make_crops(small=0)], callbacks=[Look()])
    assert max(norms) == pytest.approx(1e-4, rel=0.02)
    norms.clear()
    changes["method_kwargs"]["clip_grad"] = 0.0
    module = build(tiny_cfg("dino", max_epochs=1, **changes))
    fit(module, [make_crops(small=0)], callbacks=[Look()], gradient_clip_val=1e-3)
    assert sum(n**2 for n in norms) ** 0.5 < 1.01e-3


@pytest.mark.skipif(
    host.GENERATION != "release", reason="main takes a config and fills in defaults"
)
def test_own_method__missing_argument__named(tiny_cfg, build):
    changes = {**CHANGES, "method_kwargs": {"proj_hidden_dim": 16, "proj_output_dim": 8}}
    with pytest.raises(ValueError, match=r"method=simclr of solo-learn 1\.0\.2: .*temperature"):
        build(tiny_cfg("simclr", **changes))


@pytest.mark.parametrize("name", ["base", "linear", "simclrr"])
def test_what_is_no_method__named(tiny_cfg, build, name):
    with pytest.raises(ValueError, match=rf"method='{name}' is unknown: choose one of .*simclr"):
        build(tiny_cfg(name))
