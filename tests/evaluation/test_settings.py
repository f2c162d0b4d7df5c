from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from dinovmf_plugin.evaluation.finetuning.settings import FinetuneSettings
from dinovmf_plugin.evaluation.protocols import PROTOCOLS, AllSettings, evaluation_settings
from dinovmf_plugin.evaluation.retrieval.settings import RetrievalSettings
from dinovmf_plugin.evaluation.video.settings import VideoSettings
from dinovmf_plugin.runs.reference import default_values
from dinovmf_plugin.runs.settings import read


def test_every_key_is_in_the_config_with_the_protocols_default(compose):
    config = OmegaConf.to_container(compose("evaluate"))
    assert config == default_values(AllSettings) | {"evaluations": list(PROTOCOLS)}


@pytest.mark.parametrize(
    ("config", "kind"), [("retrieval", RetrievalSettings), ("video_segmentation", VideoSettings)]
)
def test_config__names_every_setting_with_its_default(compose, config, kind):
    assert OmegaConf.to_container(compose(config)) == default_values(kind)


def test_the_protocols(compose):
    config = compose("evaluate")
    assert list(config.knn.ks) == [10, 20, 100, 200]
    assert (config.knn.temperature, config.knn.interpolation) == (0.07, "bicubic")
    assert (config.knn.resize, config.knn.crop_size) == (256, 224)
    linear = config.linear
    assert (linear.epochs, linear.batch_size, linear.momentum, linear.weight_decay) == (
        100,
        1024,
        0.9,
        0,
    )
    assert 0.001 in linear.lrs
    assert (linear.min_scale, linear.train_interpolation, linear.interpolation) == (
        0.08,
        "bilinear",
        "bicubic",
    )
    assert (config.few_shot.lambd, config.few_shot.interpolation) == (0.075, "bilinear")
    assert config.few_shot.feature == "cls_pre_norm"
    transfer = config.transfer
    assert (transfer.log10_min, transfer.log10_max, transfer.num_values, transfer.folds) == (
        -6,
        5,
        45,
        5,
    )
    assert (transfer.resize, transfer.crop_size, transfer.interpolation) == (224, 224, "bicubic")


def test_finetuning_recipes(compose):
    small = OmegaConf.to_container(compose("finetune").finetune)
    assert small == default_values(FinetuneSettings)
    assert (small["epochs"], small["layer_decay"], small["drop_path"]) == (200, 0.75, 0.1)
    assert small["lr"] == [8e-4, 9e-4, 1e-3, 2e-3]
    base = compose("finetune", "evaluation/recipe=beit_base").finetune
    assert (base.epochs, base.layer_decay, base.drop_path, base.batch_size) == (
        100,
        0.65,
        0.2,
        1024,
    )
    deit = compose("finetune", "evaluation/recipe=deit").finetune
    assert (deit.epochs, deit.batch_size, deit.lr, deit.warmup_epochs) == (1000, 768, 7.5e-6, 5)
    assert (deit.layer_decay, deit.repeated_aug, deit.weight_decay) == (None, 3, 0.05)
    for recipe in (base, deit):
        read(FinetuneSettings, recipe)
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing) == (0.8, 1.0, 0.1)
        assert recipe.auto_augment == "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=null"], "checkpoint=None must be set"),
        (["output_dir=null"], "output_dir=None must be set"),
        (
            ["evaluations=[knnn]"],
            r"evaluations=\['knnn'\] must be a list of knn, linear, few_shot or transfer",
        ),
        (["evaluations=[knn,knn]"], "must name each once"),
        (["evaluations=[]"], "one at least"),
        (["baselines=[nothing]"], r"baselines=\['nothing'\] must be a list of untrained or pixels"),
        (["which=tutor"], "which='tutor' must be teacher or student"),
        (["precision=int8"], "precision='int8'"),
        (["cache_dtype=int8"], "cache_dtype='int8'"),
        (["data.format=tar"], "data.format='tar'"),
        (["data.batch_size=0"], "data.batch_size=0 must be a whole number of at least 1"),
        (["data.num_workers=-1"], "data.num_workers=-1"),
        (["knn.ks=[]"], r"knn.ks=\[\]"),
        (["knn.temperature=0"], "knn.temperature=0"),
        (["knn.crop_size=300"], "knn.crop_size=300 must be at most resize=256"),
        (["linear.lrs=[0]"], r"linear.lrs=\[0\]"),
        (["linear.features=[]"], "one at least"),
        (["linear.holdout=1"], "linear.holdout=1"),
        (["linear.min_scale=0"], "linear.min_scale=0"),
        (["linear.train_interpolation=box"], "linear.train_interpolation='box'"),
        (["few_shot.counts=[0]"], r"few_shot.counts=\[0\]"),
        (["few_shot.counts=[]", "few_shot.fraction=null"], "leave nothing to do"),
        (["few_shot.fraction=2"], "few_shot.fraction=2"),
        (["few_shot.lambd=0"], "few_shot.lambd=0"),
        (["transfer.folds=1"], "transfer.folds=1 must be a whole number of at least 2"),
        (["transfer.select=best"], "transfer.select='best'"),
        (["transfer.datasets=[dtd]"], "needs transfer.root"),
        (["transfer.n_jobs=0"], "transfer.n_jobs=0 must be a whole number of at least 1 or null"),
        (["transfer.max_iter=0"], "transfer.max_iter=0 must be a whole number of at least 1"),
        (
            ["knn.ks=10"],
            r"^knn.ks=10 must be a list of whole numbers of at least 1, one at least: \[10\]$",
        ),
        (
            ["knn.ks=[1.5]"],
            r"^knn.ks=\[1.5\] must be a list of whole numbers of at least 1, one at least$",
        ),
        (
            ["linear.lrs=0.1"],
            r"linear.lrs=0.1 must be a list of numbers above 0, one at least: \[0.1\]",
        ),
        (["linear.epochs=1.5"], "linear.epochs=1.5 must be a whole number of at least 1$"),
        (["linear.augment=1"], "linear.augment=1 must be true or false"),
        (
            ["linear.features=cls"],
            r"features='cls' must be a list of cls, .* or groups of keys, one at least: \[",
        ),
        (
            ["few_shot.fraction=true"],
            "few_shot.fraction=True must be a number above 0 and at most 1 or null",
        ),
        (["data.batch_size=many"], "data.batch_size='many' must be a whole number of at least 1$"),
        (["data.train_path=7"], "data.train_path=7 must be a path or null"),
        (
            ["evaluations=knn"],
            r"^evaluations='knn' must be a list of knn, .*, one at least: \[knn\]$",
        ),
        (
            ["baselines=pixels"],
            r"baselines='pixels' must be a list of untrained or pixels: \[pixels\]",
        ),
        (["knn=5"], "knn=5 must be a group of keys"),
    ],
)
def test_bad_values_name_their_key(compose, overrides, message):
    config = compose("evaluate", "checkpoint=a", "output_dir=b", *overrides)
    with pytest.raises(ValueError, match=message):
        evaluation_settings(config)


ISSUE = {
    "knn.temperature": [float("nan"), float("inf"), 0],
    "linear.momentum": [float("nan"), 1.0],
    "linear.weight_decay": [float("inf"), -1.0],
    "linear.lrs": [[float("nan")], [float("inf")]],
    "few_shot.max_iter": [0],
    "few_shot.tol": [0.0, float("nan")],
    "few_shot.feature": [{"n_last_blocks": float("nan")}, {"n_last_block": 1}, "clss"],
    "transfer.log10_max": [float("inf"), 400.0],
}


@pytest.mark.parametrize("key", ISSUE)
def test_numbers_out_of_bounds_print_no_score(key):
    section, name = key.split(".")
    base = {"checkpoint": "a", "output_dir": "b", "evaluations": [section]}
    for value in ISSUE[key]:
        with pytest.raises(ValueError) as caught:
            evaluation_settings(base | {section: {name: value}})
        assert str(caught.value).startswith(f"{key}={value!r} must be ")


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"knn\.kss is no known key: did you mean ks\?"):
        evaluation_settings({"checkpoint": "a", "output_dir": "b", "knn": {"kss": 1}}, ["knn"])
    with pytest.raises(ValueError, match="chekpoint is no known key: did you mean checkpoint?"):
        evaluation_settings({"evaluations": ["knn"], "chekpoint": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": [-1.0]}, "a list of numbers above 0, one at least"),
        ({"lr": []}, "a list of numbers above 0, one at least"),
        ({"warmup_epochs": 200}, "warmup_epochs=200 must be below epochs=200"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be a number above 0 and below 1 or null"),
        ({"ema_decay": 0}, "ema_decay=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"clip_grad": 0}, "clip_grad=0"),
        ({"mixup": -1}, "mixup=-1"),
        ({"batch_size": 3}, "batch_size=3 must be even"),
        ({"dataset": "cifar10"}, "go together"),
        ({"train_interpolation": "box"}, "train_interpolation='box'"),
    ],
)
def test_bad_finetuning_values_name_their_key(change, message):
    with pytest.raises(ValueError, match=message):
        read(FinetuneSettings, change, "finetune.")


def test_lists_and_numbers_of_every_kind_are_taken():
    sections = {
        "knn": {"ks": range(1, 3), "temperature": 1},
        "linear": {"lrs": tuple(np.array([0.1, 1.0]))},
    }
    data = {"train_path": Path("train"), "batch_size": np.int64(4)}
    given = {"checkpoint": "a", "output_dir": Path("b"), "evaluations": ("knn",), "data": data}
    settings = evaluation_settings(given | sections)
    assert list(settings.sections["knn"].ks) == [1, 2]
    assert settings.data.batch_size == 4


PATHS = {"checkpoint": "a", "data_path": "b", "output_dir": "c"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RetrievalSettings, {"scales": 1.0}, r"a list of numbers .*: \[1.0\]"),
        (RetrievalSettings, {"imsize": "big"}, "imsize='big' must be a whole"),
        (VideoSettings, {"topk": 1.5}, "topk=1.5 must be a whole number"),
        (VideoSettings, {"sequences": "bear"}, r"a list of text or null: \[bear"),
    ],
)
def test_wrong_types_of_the_others_name_their_key_too(kind, change, message):
    with pytest.raises(ValueError, match=message):
        read(kind, PATHS | change)
