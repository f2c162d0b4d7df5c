"""The command ``dinovmf``: its verbs, what it lists, and how it ends."""

from __future__ import annotations

import pytest

from dinovmf_plugin.__main__ import main
from dinovmf_plugin.recipes import list_recipes


def test_usage__names_every_verb(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for verb in ("pretrain", "knn", "linear", "video", "analyze", "compare", "doctor", "export"):
        assert f" {verb}" in told
    assert "main_pretrain" not in told
    assert main([]) == 2


def test_unknown_verb__is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pretrian"])
    assert ended.value.code == 2
    assert "'pretrian' is neither a verb nor a file" in capsys.readouterr().err


def test_recipes__are_listed_by_word(capsys):
    every = list_recipes()
    assert "custom/dino_vmf" in every
    assert all(every.values()), "a recipe without a first line that tells what it is"
    assert main(["recipes", "vmf", "imagenet/"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name in every if "vmf" in name and "imagenet/" in name]
    with pytest.raises(SystemExit):
        main(["recipes", "resnet9000"])


def test_help_of_a_verb__lists_its_keys(capsys):
    assert main(["knn", "--help"]) == 0
    told = capsys.readouterr().out
    assert "knn.temperature=0.07  (a number above 0)" in told
    assert "checkpoint=REQUIRED" in told
    assert main(["pretrain", "--help"]) == 0
    told = capsys.readouterr().out
    assert "optimizer.lr=" in told
    assert "method=ibot_vmf" in told
