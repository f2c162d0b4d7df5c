"""benchmark.py gpu: parts in processes of their own, within their time, written one by one."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from dinovmf_plugin.benchmarks import gpu, topics
from dinovmf_plugin.benchmarks.harness import read_settings
from dinovmf_plugin.benchmarks.settings import TOPIC_SETTINGS


def part(limit, code, report=None):
    return limit, [sys.executable, "-c", code], report


def test_run_parts__outcomes_reports_and_a_call_after_every_part(tmp_path):
    report, seen = tmp_path / "a.json", []
    parts = {
        "good": part(60, f"open({str(report)!r}, 'w').write('[3]'); print('well')", report),
        "bad": part(60, "raise SystemExit('no')"),
        "slow": part(2, "import time; print('begun', flush=True); time.sleep(60)"),
    }
    results = gpu.run_parts(parts, 300, lambda so_far: seen.append(list(so_far)))
    assert seen == [["good"], ["good", "bad"], ["good", "bad", "slow"]]
    assert [r["outcome"] for r in results.values()] == ["ok", "failed", "stopped"]
    assert results["good"]["report"] == [3]
    assert "well" in results["good"]["said"]
    assert "no" in results["bad"]["said"]
    assert results["slow"]["seconds"] < 30


def test_run_parts__no_time_left__left_out():
    began = time.perf_counter()
    results = gpu.run_parts({"late": part(60, "import time; time.sleep(60)")}, 1, lambda _: None)
    assert results["late"]["outcome"] == "left out"
    assert time.perf_counter() - began < 5


def test_commands__are_arguments_that_the_topics_know(tmp_path):
    """Every key of every part, with a value within its bounds."""
    found = gpu.commands(list(gpu.PARTS), tmp_path)
    assert sum(limit for limit, *_ in found.values()) <= 600
    for name, (_, command, report) in found.items():
        if name == "tests":
            assert command[-4:] == ["-m", "gpu", "-q", "tests"]
            continue
        topic, *arguments = command[3:]
        assert topic in topics.TOPICS
        settings = read_settings(TOPIC_SETTINGS[topic], arguments)
        assert settings.output == str(report)
    step = read_settings(TOPIC_SETTINGS["step"], found["step"][1][4:])
    assert step.candidates == ["dino_vmf", "dino_vmf compiled", "lightly"]
    assert read_settings(TOPIC_SETTINGS["growth"], found["growth"][1][4:]).banks == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_main__without_a_gpu__named():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        gpu.main([])


def test_main__writes_after_every_part(tmp_path, monkeypatch):
    path, sizes = tmp_path / "gpu.json", []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    parts = {"loss": part(60, "print(1)"), "data": part(60, "print(2)")}
    monkeypatch.setattr(gpu, "commands", lambda names, folder: parts)
    write = gpu.write_report

    def watched(*arguments):
        write(*arguments)
        sizes.append(len(json.loads(path.read_text())["results"]))

    monkeypatch.setattr(gpu, "write_report", watched)
    gpu.main([f"output={path}", "parts=loss,data"])
    assert sizes == [1, 2]
    report = json.loads(path.read_text())
    assert report["machine"]["gpu"] == "a card"
    assert report["results"]["data"]["said"] == "2\n"
