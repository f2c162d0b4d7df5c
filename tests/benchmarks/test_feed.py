"""The feed benchmark on a small problem: a step with and without loading."""

from __future__ import annotations

import json

import pytest

from dinovmf_plugin.benchmarks import feed

SMALL = [
    "recipe=demo_recipe",
    "batch=4",
    "workers=1",
    "steps=3",
    "warmup=1",
    "photos=4",
    "overrides=method_kwargs.num_prototypes=32 method_kwargs.monitor=False",
]


def test_report__rates_with_and_without_loading(tmp_path, capsys):
    path = tmp_path / "feed.json"
    feed.main([*SMALL, "candidates=step,torchvision", f"output={path}"])
    report = json.loads(path.read_text())
    result = report["results"]
    assert set(result["step_images_per_second"]) == {"step", "torchvision"}
    assert min(result["step_images_per_second"].values()) > 0
    rates = result["step_images_per_second"]
    assert result["share_of_step"]["torchvision"] == pytest.approx(
        rates["torchvision"] / rates["step"]
    )
    assert set(result["loader_images_per_second"]) == {"torchvision"}
    assert report["machine"]["gpu"] is None
    assert str(tmp_path) not in report["command"]
    assert "% of the step alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("candidates=step,webdataset", "candidates=step,webdataset must be a list of step, dali"),
        ("device=tpu", "device=tpu must be cpu or gpu"),
        ("steps=0", "steps=0 must be a whole number of at least 1"),
        ("stepz=2", "stepz is no known key: did you mean steps"),
    ],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        feed.main([*SMALL, argument])
