"""Two real processes give what one gives, through the whole runner; light imports on purpose."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf


def _evaluate_on_a_rank(rank, config):
    from dinovmf_plugin.evaluation.runner import evaluate

    return evaluate(config)


@pytest.mark.filterwarnings("ignore:.*are skipped")
def test_two_processes_give_the_same_as_one(ddp, compose, run_overrides, tmp_path):
    small = ["evaluations=[knn,linear,few_shot,transfer]", "transfer.num_values=3"]
    small += [
        f"{name}.{key}=24"
        for name in ("knn", "linear", "few_shot", "transfer")
        for key in ("resize", "crop_size")
    ]
    # without augmentation, whose random crops depend on which process draws them
    small += [
        "linear.augment=false",
        "linear.epochs=2",
        "linear.batch_size=16",
        "few_shot.counts=[2]",
    ]
    config = OmegaConf.to_container(compose("evaluate", *run_overrides, *small))

    from dinovmf_plugin.evaluation.runner import evaluate

    one = evaluate(config)
    two = ddp(_evaluate_on_a_rank, config | {"output_dir": str(tmp_path / "two")})
    for found in two:
        assert found["processes"] == 2
        for k in ("k10", "k20"):
            assert found["knn"][k] == one["knn"][k]
        assert found["few_shot"]["top1"] == one["few_shot"]["top1"]
        for key in ("top1", "weight_decay", "cv"):
            ours, theirs = (
                found["transfer"]["datasets"]["data"],
                one["transfer"]["datasets"]["data"],
            )
            assert ours[key] == theirs[key]
        for name in ("cls", "dino"):
            ours, theirs = (r["linear"]["features"][name]["curves"]["top1"] for r in (found, one))
            assert ours == theirs
    written = json.loads(Path(tmp_path / "two" / "results.json").read_text())
    assert written["knn"]["k10"] == one["knn"]["k10"]


def _finetune_on_a_rank(rank, config):
    from unittest import mock

    from dinovmf_plugin.evaluation.finetuning import run as finetune_run

    tuners = []

    def kept(*args, make=finetune_run.FineTuner):
        tuners.append(make(*args))
        return tuners[0]

    with mock.patch.object(finetune_run, "FineTuner", kept):
        result = finetune_run.finetune(config)
    return result, {name: value.tolist() for name, value in tuners[0].model.named_parameters()}


def test_two_processes_fine_tune_one_network(ddp, compose, run_overrides, tmp_path):
    small = ["resize=24", "crop_size=24", "batch_size=16", "epochs=2", "warmup_epochs=1"]
    small += ["lr=0.002", "init_scale=1.0"]
    overrides = [f"finetune.{setting}" for setting in small]
    config = OmegaConf.to_container(compose("finetune", *run_overrides, *overrides))
    (first, weights), (second, other_weights) = ddp(_finetune_on_a_rank, config)
    assert weights == other_weights  # gradients are averaged
    first, second = first["runs"][0], second["runs"][0]
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert ours["top1"] == theirs["top1"]  # of all images
        assert ours["loss"] != theirs["loss"]  # of a process's own
    written = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert written["runs"] == [first]
    assert written["val_images"] == 20
