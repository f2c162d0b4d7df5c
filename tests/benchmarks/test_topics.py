"""scripts/benchmark.py: help of the command and of every topic; what is unknown is named."""

from __future__ import annotations

import importlib
import json

import pytest

from dinovmf_plugin.benchmarks import harness, topics
from dinovmf_plugin.benchmarks.settings import TOPIC_SETTINGS
from dinovmf_plugin.runs.reference import default_values


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
    for key, value in default_values(TOPIC_SETTINGS[topic]).items():
        assert f"\n{key}={json.dumps(value)}  (" in shown
    assert "JSON file; written only if given" in shown


def test_topics__have_settings():
    assert list(TOPIC_SETTINGS) == list(topics.TOPICS)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["speed"], "benchmark 'speed' is unknown: choose one of loss, step"),
        ([], "benchmark '' is unknown: choose one of loss, step"),
        (["loss", "bach=3"], "error: bach is no known key: did you mean batch?"),
    ],
)
def test_what_is_refused__one_sentence_and_status_2(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        topics.main(argv)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_machine__names_allocator_and_threads(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    about = harness.machine()
    assert about["allocator"] == "libjemalloc.so.2 MALLOC_TRIM_THRESHOLD_=123"
    assert about["threads"] >= 1
