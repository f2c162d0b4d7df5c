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
