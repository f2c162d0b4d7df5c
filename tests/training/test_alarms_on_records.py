"""The alarms on records of real runs: all that ended near uniform are told, healthy ones are not.

``records.json`` holds extracts. Collapsed: the loss of every epoch of 36 runs of DINO and DINO-vMF on
silhouettes (lr 8e-3 and more, EMA 0.99), which were once taken for a comparison. Healthy: the monitor's
records of the demo's two methods on photographs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinovmf_plugin.training.alarms import CollapseWatch

RECORDS = json.loads((Path(__file__).parent / "records.json").read_text())
COLLAPSED, HEALTHY = RECORDS["collapsed"], RECORDS["healthy"]


@pytest.mark.parametrize("run", COLLAPSED["runs"], ids=lambda run: run["run"])
def test_collapsed_run__is_told_within_two_epochs_after_the_warm_up(run):
    watch = CollapseWatch(COLLAPSED["num_prototypes"], patience=2)
    told = {}
    for epoch, loss in enumerate(run["loss_over_log_k"], 1):
        warm = epoch > COLLAPSED["warmup_epochs"]
        for alarm in watch.update({"loss_over_log_k": loss}, warm=warm):
            told.setdefault(epoch, alarm.name)
    assert told, run
    assert min(told) == COLLAPSED["warmup_epochs"] + 2
    assert set(told.values()) <= {"uniform_collapse", "information_lost"}


@pytest.mark.parametrize("method", sorted(HEALTHY["runs"]))
def test_healthy_run__sets_off_no_alarm_even_without_patience(method):
    watch = CollapseWatch(HEALTHY["num_prototypes"], patience=1)
    records = HEALTHY["runs"][method]
    alarms = [
        alarm
        for record in records
        for alarm in watch.update(record, warm=record["epoch"] >= HEALTHY["warmup_epochs"])
    ]
    assert len(records) > 40
    assert alarms == []
