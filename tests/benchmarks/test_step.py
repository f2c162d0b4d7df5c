"""The step benchmark on tiny networks: every candidate trains, is timed, and nothing is overwritten."""

from __future__ import annotations

import importlib.util
import json
import statistics

import pytest

from dinovmf_plugin.benchmarks import step, step_candidates
from dinovmf_plugin.benchmarks.settings import StepSettings

TINY = ["batch=2", "backbone=vit_nano", "size=32", "prototypes=32", "rounds=2", "steps=2"]


@pytest.mark.parametrize("crops", [0, 2])
def test_report__times_of_every_candidate(tmp_path, capsys, crops):
    path = tmp_path / "step.json"
    step.main([*TINY, f"crops={crops}", f"output={path}"])
    report = json.loads(path.read_text())
    result = report["results"]
    names = ["dino_vmf", "dino_vmf none", "dino_multicrop"]
    names += ["lightly"] if importlib.util.find_spec("lightly") else []
    names += ["host"] if crops == 0 else []
    assert list(result["median"]) == names
    for name in names:
        assert len(result["seconds"][name]) == 2 * 2
        assert result["median"][name] == statistics.median(result["seconds"][name]) > 0
        assert result["images_per_second"][name] == 2 / result["median"][name]
        assert result["counts"][name]["flops"] > 0
    launches = {name: result["counts"][name]["launches"] for name in names}
    assert launches["dino_vmf"] < launches.get("lightly", 10**9)
    assert result["counts"]["dino_vmf"]["waits"] == 0
    assert report["machine"]["allocator"]
    ours = result["median"]["dino_vmf"]
    assert result["ratio"] == {n: ours / result["median"][n] for n in names if n != "dino_vmf"}
    assert "dino_vmf takes" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"step\.json"):
        step.main([*TINY, f"output={path}"])


def test_candidates__share_backbone_prototypes_and_views():
    settings = StepSettings(backbone="vit_nano", size=32, prototypes=32)
    ours, theirs = (step_candidates.build(settings, name) for name in ("dino_multicrop", "host"))
    assert type(theirs).__name__ == "DINO"
    their_backbone = getattr(theirs, "backbone", None) or theirs.encoder  # 1.0.2's name
    for pair in ((ours.head, theirs.head), (ours.backbone, their_backbone)):
        shapes = [sorted(tuple(p.shape) for p in network.parameters()) for network in pair]
        assert shapes[0] == shapes[1]
    vmf, none = (step_candidates.build(settings, name) for name in ("dino_vmf", "dino_vmf none"))
    prototypes = [module.head.last_layer.normalization for module in (vmf, none)]
    assert prototypes == ["vmf", "none"]
    assert type(vmf.centering) is type(none.centering)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bach=3", "bach is no known key: did you mean batch"),
        ("batch=two", "batch=two must be a whole number"),
        ("rounds=0", "rounds=0 must be a whole number of at least 1"),
        ("crops=-1", "crops=-1 must be a whole number of at least 0"),
        ("size=8", "size=8 must be a whole number of at least 16"),
        ("steps", "steps must be key=value"),
        ("candidates=dino_vmf,ours", "candidates=dino_vmf,ours must be a list of dino_vmf, "),
        ("candidates=host", "dino_vmf among them"),
        ("batches=swapped", "batches=swapped must be device, pinned or pageable"),
    ],
)
def test_wrong_argument__is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        step.main([argument])
