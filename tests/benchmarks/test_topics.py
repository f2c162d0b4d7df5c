"""scripts/benchmark.py: help of the command and of every topic; what is unknown is named."""

from __future__ import annotations

import importlib

import pytest

from dinovmf_plugin.benchmarks import harness, topics


def test_help__names_every_topic(capsys):
    topics.main(["--help"])
    shown = capsys.readouterr().out
    for name in topics.TOPICS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("topic", topics.TOPICS)
def test_help_of_a_topic__names_every_key_and_measures_nothing(topic, capsys, monkeypatch):
    if topic in ("data", "feed"):
        pytest.importorskip("nvidia.dali")
    module = importlib.import_module(f"dinovmf_plugin.benchmarks.{topic}")
    monkeypatch.setattr(module, "main", None)
    topics.main([topic, "--help"])
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown
    for key, value in module.DEFAULTS.items():
        assert f"{key}={value}" in shown
    assert "JSON file; written only if given" in shown


@pytest.mark.parametrize("argv", [["speed"], []])
def test_unknown_topic__is_named(argv):
    with pytest.raises(SystemExit, match="is unknown: choose one of loss, step"):
        topics.main(argv)


def test_wrong_key__one_sentence():
    with pytest.raises(SystemExit, match=r"benchmark loss: argument 'bach=3' is unknown"):
        topics.main(["loss", "bach=3"])


def test_machine__names_allocator_and_threads(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    about = harness.machine()
    assert about["allocator"] == "libjemalloc.so.2 MALLOC_TRIM_THRESHOLD_=123"
    assert about["threads"] >= 1
