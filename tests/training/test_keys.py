"""Recipe keys and values: what nobody reads, and what cannot be, is one sentence before anything is built."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dinovmf_plugin import host
from dinovmf_plugin.training.keys import check_keys
from dinovmf_plugin.training.schema import check_values, trainer_arguments

TYPOS = {
    "data.no_label": "data.no_labels",
    "data.skip_unreadble": "data.skip_unreadable",
    "data.trian_path": "data.train_path",
    "auto_resume.enable": "auto_resume.enabled",
    "optimizer.weight_decy": "optimizer.weight_decay",
    "optimizer.kwarg.betas": "optimizer.kwargs",
    "scheduler.warmup_epoch": "scheduler.warmup_epochs",
    "checkpoint.frequncy": "checkpoint.frequency",
    "momentum.base_tua": "momentum.base_tau",
    "dali.devise": "dali.device",
    "wandb.projct": "wandb.project",
    "knn_eval.ks": "knn_eval.k",
    "performance.disable_channels_last": "performance.disable_channel_last",
    "backbone.nam": "backbone.name",
    "accumulate_grad_batch": "accumulate_grad_batches",
    "gradient_clip": "gradient_clip_val",
    "max_epoch": "max_epochs",
    "augmentation": "augmentations",
    "optimiser.lr": "optimizer",
    "method_kwarg.clip_grad": "method_kwargs",
    # at another place
    "batch_size": "optimizer.batch_size",
    "train_path": "data.train_path",
    "data.batch_size": "optimizer.batch_size",
    "optimizer.precision": "precision",
}


def _config(key: str, value: Any = 1) -> Any:
    cfg = OmegaConf.create({"name": "run", "data": {"train_path": "x"}, "optimizer": {"lr": 0.1}})
    OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(("key", "meant"), TYPOS.items())
def test_misspelt_key__named_with_the_nearest(key, meant):
    with pytest.raises(ValueError, match=r"is no key of a recipe: did you mean") as error:
        check_keys(_config(key))
    message = str(error.value)
    assert message.endswith(f"did you mean {meant}?")
    named = message.split(" ")[0]  # the first level that is wrong
    assert f"{key}.".startswith(f"{named}.")
    check_keys(_config(meant, {} if meant in ("optimizer", "method_kwargs") else 1))


def test_unknown_key__known_ones_listed_and_all_of_them_named():
    with pytest.raises(
        ValueError, match="checkpoint.zzz is no key of a recipe: known keys are"
    ) as e:
        check_keys(_config("checkpoint.zzz"))
    assert "checkpoint.dir, checkpoint.enabled" in str(e.value)
    cfg = _config("data.no_label")
    cfg.gradient_clip = 3
    with pytest.raises(ValueError, match=r"^data.no_label is .*\?; gradient_clip is .*\?$"):
        check_keys(cfg)


def test_keys_of_others__stay(tmp_path):
    for name in trainer_arguments():
        if name not in ("callbacks", "logger", "default_root_dir"):
            check_keys(_config(name, None))
    for key in ("method_kwargs.anything", "backbone.kwargs.window_size", "optimizer.kwargs.eta"):
        check_keys(_config(key))
    # a helper that other keys refer to is read
    cfg = OmegaConf.create(
        {"mine": {"lr": 0.1}, "optimizer": {"lr": "${mine.lr}"}, "w": "${.name}"}
    )
    with pytest.raises(ValueError, match="^w is no key"):
        check_keys(cfg)
    del cfg.w
    check_keys(cfg)
    cfg.optimizer.lr = 0.1
    with pytest.raises(ValueError, match="^mine is no key"):
        check_keys(cfg)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("logger", "csv", "wandb"),
        ("callbacks", ["x"], "checkpoint"),
        ("default_root_dir", "x", "checkpoint.dir"),
        ("enable_checkpointing", True, "checkpoint.enabled"),
        ("num_sanity_val_steps", 2, "before training"),
    ],
)
def test_arguments_that_a_run_gives_itself__refused(key, value, place):
    with pytest.raises(ValueError, match=rf"{key}=.* is not for a recipe: .*{place}"):
        check_keys(_config(key, value))


# found, not imported: an import of the release works only after the host's shims
SCRIPTS = Path(str(importlib.util.find_spec("solo").origin)).parents[1] / "scripts" / "pretrain"


@pytest.mark.skipif(host.GENERATION != "main", reason="1.0.2 has no recipes in YAML")
def test_hosts_own_recipes__every_key_is_known():
    if not SCRIPTS.is_dir():
        pytest.skip("solo-learn is installed without its scripts")
    count = 0
    for path in sorted(SCRIPTS.glob("*/*.yaml")):
        if "defaults:" not in path.read_text():
            continue
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(path.parent), version_base="1.2"):
            cfg = compose(path.stem)
        check_keys(cfg)
        count += 1
    assert count > 30


WRONG = {
    "max_epochs": [0, -1, 2.5, "ten", True],
    "num_nodes": [0, "two"],
    "accumulate_grad_batches": [0, 1.5, "2"],
    "gradient_clip_val": [-1, "three", math.nan, math.inf],
    "limit_train_batches": ["all", math.nan],
    "max_steps": [1.5, "many"],
    "min_epochs": ["one"],
    "detect_anomaly": ["yes", 1],
    "enable_progress_bar": ["no", 0],
    "sync_batchnorm": ["yes"],
    "data.fraction": [2, -2, math.nan, "half"],
    "data.num_workers": [-1, 1.5, "four"],
    "data.no_labels": ["yes", 1],
    "dali.encode_indexes_into_labels": ["yes"],
    "optimizer.batch_size": [0, -4, 2.5, "64 images"],
    "optimizer.lr": [-1e-3, math.nan, math.inf, "5e-4 or so", [0.1]],
    "optimizer.weight_decay": [-0.1, math.nan, math.inf],
    "optimizer.kwargs.eta": [math.nan, -math.inf],
    "optimizer.exclude_bias_n_norm_wd": ["yes"],
    "scheduler.warmup_epochs": [-1, math.nan, math.inf],
    "scheduler.min_lr": [-1, math.nan],
    "momentum.base_tau": [-0.1, 1.1, math.nan],
    "momentum.final_tau": [math.inf],
    "knn_eval.k": [0, 1.5],
    "checkpoint.frequency": [-1, 0.5],
    "checkpoint.dir": [3, ""],
    "wandb.project": [3],
    "wandb.offline": ["yes"],
    "method_kwargs.anything": [math.nan],
    "backbone.kwargs.drop_path_rate": [1.0, -0.1],
    "optimizer": [3],
    "wandb": ["mine"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_impossible_value__named(key, value):
    with pytest.raises(ValueError, match=rf"^{key}=.* must be") as error:
        check_values(_config(key, value))
    assert "\n" not in str(error.value)
