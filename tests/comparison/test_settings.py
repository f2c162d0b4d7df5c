"""Configs, the sweep they describe, and one clear sentence for what cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.comparison.devices import lease_gpu
from dinovmf_plugin.comparison.settings import run_from
from dinovmf_plugin.comparison.shared import RunSettings
from dinovmf_plugin.comparison.sweep import ComparisonCallback, planned_runs, register_resolver
from dinovmf_plugin.recipes import Candidate, compose_recipe


@pytest.fixture(scope="module")
def configs() -> dict[str, DictConfig]:
    register_resolver()
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        return {
            kind: compose(config_name=kind, return_hydra_config=True, overrides=["hydra.job.num=0"])
            for kind in ("ablation", "compare")
        }


@pytest.fixture
def plain(configs: dict[str, DictConfig]) -> Any:
    """Factory of a script's config as plain containers, with changes by dotted key."""

    def make(kind: str, **changes: Any) -> dict[str, Any]:
        own = OmegaConf.masked_copy(configs[kind], [str(k) for k in configs[kind] if k != "hydra"])
        for key, value in changes.items():
            OmegaConf.update(own, key, value, force_add=True)
        return OmegaConf.to_container(own, resolve=True)  # type: ignore[return-value]

    return make


def test_sweeps_are_those_of_the_paper(configs: dict[str, DictConfig]) -> None:
    assert configs["ablation"].hydra.sweeper.params == {
        "method_kwargs.normalization": "'none','l2','vmf'",
        "method_kwargs.centering": "'logit','probability'",
        "method_kwargs.prototype_spread": "null",
        "seed": "0,1,2",
    }
    params = configs["compare"].hydra.sweeper.params
    patches = "teacher_patch_temperature=0.04,warmup_teacher_patch_temperature=0.04"
    assert params.candidate == (
        f"'dino_multicrop','dino_vmf','ibot:{patches}','ibot_vmf:{patches}',"
        "'msn:teacher_temperature=0.025','msn_vmf:teacher_temperature=0.025'"
    )
    assert (params.lr, params.seed) == ("null", "0,1,2")


def test_ablation_plans_every_cell_with_every_seed(plain: Any) -> None:
    runs = planned_runs(plain("ablation", **{"method_kwargs.center_momentum": 0.5}), "ablation")
    cells = {
        (r.candidate.settings["normalization"], r.candidate.settings["centering"], r.seed)
        for r in runs
    }
    assert len(runs) == len(cells) == 18
    recipe = runs[-1].recipe()
    assert recipe.method == "dino_multicrop"
    assert recipe.method_kwargs.normalization == "vmf"
    assert recipe.method_kwargs.centering == "probability"
    assert recipe.method_kwargs.center_momentum == 0.5
    assert recipe.data.train_path == "ablation/data/train"
    assert recipe.auto_resume.enabled


def test_jobs_are_the_planned_runs(plain: Any) -> None:
    planned = planned_runs(plain("ablation", seeds=[7]), "ablation")[1]
    job = plain(
        "ablation", seed=7, seeds=[7],
        **{"method_kwargs.normalization": "none", "method_kwargs.centering": "probability"},
    )  # fmt: skip
    assert run_from(job, "ablation").recipe() == planned.recipe()


def test_candidates_change_what_they_name(tmp_path: Path) -> None:
    candidate = Candidate.parse("imagenet/dino_vits16:normalization=l2,clip_grad=0.3")
    recipe = compose_recipe("demo_recipe", candidate, seed=5, lr=0.25, overrides=["max_epochs=3"])
    assert (recipe.method, recipe.backbone.name, recipe.max_epochs) == (
        "dino_multicrop",
        "vit_small",
        3,
    )
    assert (recipe.method_kwargs.normalization, recipe.method_kwargs.clip_grad) == ("l2", 0.3)
    assert (recipe.seed, recipe.optimizer.lr) == (5, 0.25)
    assert recipe.name == "imagenet-dino_vits16-normalization-l2-clip_grad-0.3-lr0.25-seed5"


def test_recipe_settings_that_a_method_lacks_are_left_out() -> None:
    recipe = compose_recipe("demo_recipe", Candidate("msn"), seed=0)
    assert "warmup_teacher_temperature" not in recipe.method_kwargs
    assert recipe.method_kwargs.teacher_temperature > 0
    named = ["+method_kwargs.no_such_key=1"]
    recipe = compose_recipe("demo_recipe", Candidate("msn"), seed=0, overrides=named)
    assert "no_such_key" in recipe.method_kwargs  # for the method itself to refuse


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "compare",
            {"methods": ["dino_vmff"]},
            "'dino_vmff' is unknown: choose from dino_multicrop",
        ),
        ("compare", {"methods": []}, r"methods=\[\] must be a list of text, one at least"),
        ("compare", {"methods": ["msn", "msn"]}, "twice"),
        ("compare", {"methods": ["msn:normalization"]}, "NAME:key=value"),
        ("compare", {"seeds": []}, r"seeds=\[\] must be a list of whole numbers .*, one at least"),
        ("compare", {"seeds": ["a"]}, "whole numbers"),
        ("compare", {"stability.lrs": [-1]}, r"stability.lrs=\[-1\]"),
        ("ablation", {"base_method": "byol"}, "base_method='byol' must be dino_multicrop, "),
        ("ablation", {"centerings": []}, r"centerings=\[\]"),
        ("ablation", {"k": 7}, r"k=7 must be one of evaluation.knn.ks"),
        ("ablation", {"evaluations": ["linear"]}, "must include knn"),
        ("ablation", {"evaluation.checkpoint": "x"}, "evaluation.checkpoint is set by every run"),
        ("ablation", {"evaluation.data.val_path": "x"}, "set data.val_path"),
        ("ablation", {"evaluation.linear.epochs": 0}, "^evaluation.linear.epochs=0 must"),
        ("ablation", {"data.demo": "cats"}, "data.demo='cats' must be "),
    ],
)
def test_what_cannot_work_is_named(
    plain: Any, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planned_runs(plain(kind, **changes), kind)


def test_recipe_and_overrides_are_checked() -> None:
    with pytest.raises(ValueError, match="recipe='nowhere/to_be_found'"):
        compose_recipe("demo_recipe", Candidate.parse("nowhere/to_be_found"), seed=0)
    with pytest.raises(ValueError, match="max_epoch"):
        compose_recipe("demo_recipe", Candidate("msn"), seed=0, overrides=["max_epoch=3"])


def test_one_folder_of_two_is_refused(make_comparison: Any, tmp_path: Path) -> None:
    settings = make_comparison(tmp_path, data={"train_path": "train"})
    with pytest.raises(ValueError, match=r"data\.val_path is missing"):
        RunSettings(settings, Candidate("dino_vmf"), 0).recipe()


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect(tmp_path)


def test_folder_keeps_to_its_settings(
    plain: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "output_dir": str(tmp_path / "out"),
        "data.train_path": str(pictures / "train"),
        "data.val_path": str(pictures / "val"),
        "overrides": ["method_kwargs.num_prototypes=64"],
    }
    callback = ComparisonCallback("compare")
    one = {**changes, "methods": ["dino_vmf"], "seeds": [0]}
    callback.on_multirun_start(OmegaConf.create(plain("compare", **one)))
    # more methods and seeds belong to the same comparison
    more = {**changes, "methods": ["dino_vmf", "dino_multicrop"], "seeds": [0, 1]}
    callback.on_multirun_start(OmegaConf.create(plain("compare", **more)))
    assert "4 runs: dino_vmf, dino_multicrop" in capsys.readouterr().out
    other = {**one, "overrides": ["method_kwargs.num_prototypes=32"]}
    with pytest.raises(SystemExit):
        callback.on_multirun_start(OmegaConf.create(plain("compare", **other)))
    assert "holds results of other settings (overrides was" in capsys.readouterr().err


_HOLDER = """
import sys
from dinovmf_plugin.comparison.devices import lease_gpu
print(lease_gpu([4, 5], sys.argv[1]), flush=True)
sys.stdin.read()
"""


def test_each_process_gets_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline().strip() == "4"
        with pytest.raises(ValueError, match=r"gpus=\[4\]: all are taken"):
            lease_gpu([4], tmp_path)
        assert lease_gpu([4, 5], tmp_path) == 5
        assert lease_gpu([4, 5], tmp_path) == 5
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        holder.stdin.close()


@pytest.mark.parametrize(
    ("recipe", "method", "cell"),
    [
        ("imagenet/dino_vitb16", "dino_multicrop", ("l2", "logit")),  # as published
        ("imagenet/dino_vitb16", "dino_vmf", ("vmf", "probability")),
        ("imagenet/ibot_vitb16", "ibot_vmf", ("vmf", "probability")),
        ("imagenet/dino_vmf_vitb16", "dino_multicrop", ("none", "logit")),
        ("imagenet/dino_vitb16", "msn", ("l2", "sinkhorn")),
    ],
)
def test_compose_recipe__a_method_brings_its_own_cell(recipe, method, cell):
    found = compose_recipe(recipe, Candidate(method), seed=0)
    assert found.method == method
    assert (found.method_kwargs.normalization, found.method_kwargs.centering) == cell


def test_ablation__spreads_are_a_third_axis(plain: Any) -> None:
    cells = {"normalizations": ["vmf"], "centerings": ["probability"], "seeds": [7]}
    runs = planned_runs(plain("ablation", spreads=[0.0, 0.1], **cells), "ablation")
    assert [run.candidate.settings["prototype_spread"] for run in runs] == [0.0, 0.1]
    assert runs[1].recipe().method_kwargs.prototype_spread == 0.1
    (alone,) = planned_runs(plain("ablation", **cells), "ablation")
    assert "prototype_spread" not in alone.candidate.settings
    with pytest.raises(ValueError, match="spreads"):
        planned_runs(plain("ablation", spreads=[-1.0], **cells), "ablation")
