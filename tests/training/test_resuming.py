"""What may differ from a checkpoint: counts, is told, or is refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dinovmf_plugin.training import resuming


def _content(epoch: int = 3, step: int = 0, steps: int = 8) -> dict[str, Any]:
    progress = {"current": {"ready": step or steps}, "is_last_batch": step == 0}
    return {
        "state_dict": {},
        "optimizer_states": [],
        "epoch": epoch,
        "global_step": 8 * epoch,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }


# ---- content -------------------------------------------------------------------------------------


def test_check_content__training_checkpoint__enough_epochs():
    resuming.check_content(_content(epoch=3), "a.ckpt", 4)
    resuming.check_content(_content(epoch=3), "a.ckpt", 9)
    with pytest.raises(
        ValueError, match=r"^max_epochs=3 is less than the 4 epochs that a\.ckpt has"
    ):
        resuming.check_content(_content(epoch=3), "a.ckpt", 3)


@pytest.mark.parametrize(
    "part", ["state_dict", "optimizer_states", "epoch", "global_step", "loops"]
)
@pytest.mark.parametrize("how", ["missing", "of another kind"])
def test_check_content__not_of_a_training_run__named(part, how):
    content = _content()
    if how == "missing":
        del content[part]
    else:
        content[part] = torch.zeros(2)
    with pytest.raises(
        ValueError, match=rf"^a\.ckpt cannot be resumed: .*no {part} of a tra"
    ) as caught:
        resuming.check_content(content, "a.ckpt", 9)
    assert "method_kwargs.init_from=a.ckpt" in str(caught.value)


@pytest.mark.parametrize("loops", [{}, {"fit_loop": {}}])
def test_check_content__foreign_loops__refused(loops):
    with pytest.raises(ValueError, match=r"no progress of the loops"):
        resuming.check_content({**_content(), "loops": loops}, "a.ckpt", 9)


def test_check_tensors__every_kind_of_misfit_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = module.state_dict()
    resuming.check_tensors(good, module)
    cases = {
        r"0\.bias is missing;": {k: v for k, v in good.items() if k != "0.bias"},
        r"extra is left over;": {**good, "extra": torch.zeros(1)},
        r"0\.weight has shape \(3, 5\) instead of \(3, 2\);": {
            **good,
            "0.weight": torch.zeros(3, 5),
        },
        r"0\.weight is no tensor;": {**good, "0.weight": [1.0]},
        r"0\.weight is missing and 4 more;": {"x": torch.zeros(1)},
    }
    for pattern, stored in cases.items():
        with pytest.raises(ValueError, match=pattern):
            resuming.check_tensors(stored, module)


# ---- configs -------------------------------------------------------------------------------------


def _cfg(**changes: Any) -> dict[str, Any]:
    cfg = OmegaConf.create(
        {
            "name": "a",
            "method": "dino_vmf",
            "backbone": {"name": "vit_tiny"},
            "method_kwargs": {"num_prototypes": 32, "normalization": "vmf"},
            "optimizer": {
                "name": "adamw",
                "lr": 0.1,
                "batch_size": 4,
                "kwargs": {"betas": [0.9, 0.99]},
            },
            "data": {"train_path": "x", "num_workers": 4},
            "devices": 1,
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return OmegaConf.to_container(cfg)


def _compare(now: dict[str, Any], step: int = 0) -> str | None:
    return resuming.compare_configs(_content(step=step), _cfg(), now)


def test_compare__nothing_that_matters__nothing_told():
    assert _compare(_cfg()) is None
    silent = {
        "name": "b",
        "data.num_workers": 0,
        "checkpoint.dir": "y",
        "accumulate_grad_batches": 1,
    }
    assert _compare(_cfg(**silent, **{"resume_from_checkpoint": "a.ckpt"}), step=3) is None


def test_compare__other_values__each_told_with_both():
    changes = {"optimizer.lr": 0.3, "optimizer.kwargs.betas": [0.9, 0.95], "data.train_path": "z"}
    told = _compare(_cfg(**changes, **{"momentum.base_tau": 0.9}), step=3)
    assert told.startswith("these values differ from the checkpoint's and count from here on: ")
    for part in (
        "optimizer.lr=0.3 (was 0.1)",
        "optimizer.kwargs.betas=[0.9, 0.95] (was [0.9, 0.99])",
        "data.train_path='z' (was 'x')",
        "momentum.base_tau=0.9 (was None)",
    ):
        assert part in told
    assert "an epoch has other steps" not in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.batch_size", 8),
        ("devices", 2),
        ("num_nodes", 2),
        ("accumulate_grad_batches", 2),
    ],
)
def test_compare__other_steps__told_at_the_end_of_an_epoch_refused_within(key, value):
    told = _compare(_cfg(**{key: value}))
    assert f"{key}={value} (was" in told
    assert "schedules go on by epochs" in told
    with pytest.raises(ValueError, match=rf"^{key}={value} \(was .*in the middle of epoch 3"):
        _compare(_cfg(**{key: value}), step=3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "ibot"),
        ("backbone.name", "vit_small"),
        ("optimizer.name", "sgd"),
        ("method_kwargs.num_prototypes", 64),
        ("method_kwargs.normalization", "l2"),
    ],
)
def test_compare__another_network_or_optimizer__refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value!r} differs from the checkpoint's"):
        _compare(_cfg(**{key: value}))


# ---- the optimizer -------------------------------------------------------------------------------


def _trained(cls: Any, **options: Any) -> tuple[torch.optim.Optimizer, nn.Module]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    groups = [
        {"params": [module.weight], "name": "a", "decay": True, "peak_lr": options["lr"]},
        {"params": [module.bias], "name": "b", "decay": False, "peak_lr": options["lr"] / 2},
    ]
    optimizer = resuming.keep_configured_values(cls(groups, **options))
    for _ in range(3):
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    return optimizer, module


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [
        (
            torch.optim.AdamW,
            {"lr": 0.1},
            {"lr": 0.3, "weight_decay": 0.2, "betas": (0.5, 0.7), "eps": 0.1},
        ),
        (
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.2, "momentum": 0.5, "nesterov": True},
        ),
    ],
)
def test_keep_configured_values__moments_come_everything_else_stays(cls, old, new):
    first, _ = _trained(cls, **old)
    second, module = _trained(cls, **new)
    configured = [{k: v for k, v in g.items() if k != "params"} for g in second.param_groups]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    kept = [{k: v for k, v in g.items() if k != "params"} for g in second.param_groups]
    assert kept == configured
    assert kept[0]["lr"] == new["lr"]
    assert kept[1]["peak_lr"] == new["lr"] / 2
    for mine, theirs in zip(second.state.values(), first.state.values(), strict=True):
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), key
    before = module.weight.detach().clone()
    module(torch.ones(1, 3)).square().sum().backward()
    second.step()
    assert not torch.equal(module.weight, before)


def test_keep_configured_values__other_groups_refused():
    first, _ = _trained(torch.optim.AdamW, lr=0.1)
    for other in (
        [{"params": [nn.Parameter(torch.zeros(2))], "name": "a"}],
        [{"params": [], "name": "c"}],
    ):
        optimizer = resuming.keep_configured_values(
            torch.optim.AdamW(
                [{**g, "params": g["params"] or [nn.Parameter(torch.zeros(1))]} for g in other]
            )
        )
        with pytest.raises(
            ValueError, match=r"other groups of parameters: \[\('a', 1\), \('b', 1\)\]"
        ):
            optimizer.load_state_dict(first.state_dict())
    second, _ = _trained(torch.optim.AdamW, lr=0.1, amsgrad=True)
    with pytest.raises(ValueError, match=r"optimizer\.kwargs\.amsgrad=True differs"):
        second.load_state_dict(first.state_dict())
