"""Importing solo-learn leaves the environment as it was."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from timm.models import _registry

from dinovmf_plugin import host
from dinovmf_plugin.host import shims


def test_scheduler__equals_the_closed_form():
    """1.0.2's configure_optimizers gets this instead of pl_bolts': per epoch, per group."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.3, 1.2, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = shims.LinearWarmupCosineAnnealingLR(
        optimizer, warmup_epochs=3, max_epochs=10, warmup_start_lr=0.01, eta_min=0.02
    )
    seen = []
    for _ in range(10):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    rest = np.arange(7)
    for column, peak in ((0, 0.3), (1, 1.2)):
        cosine = 0.02 + 0.5 * (peak - 0.02) * (1 + np.cos(np.pi * rest / 7))
        expected = np.concatenate([np.linspace(0.01, peak, 3), cosine])
        np.testing.assert_allclose([lrs[column] for lrs in seen], expected)
    assert {lrs[2] for lrs in seen} == {0.0}


def test_stand_ins__are_gone_after_the_import():
    for name in ("pytorch_lightning", "pl_bolts"):
        if importlib.util.find_spec(name) is None:
            assert not [m for m in sys.modules if m == name or m.startswith(name + ".")]


def test_hosts_modules__are_lightnings():
    """A LightningModule of another package would be refused by the Trainer."""
    from lightning.pytorch import LightningModule

    assert issubclass(host.BaseMomentumMethod, LightningModule)
    assert all(issubclass(cls, LightningModule) for cls in host.METHODS.values())


_SNAPSHOT = """
import json, sys
import timm
from timm.models import _registry
def table():
    return {name: f.__module__ for name, f in _registry._model_entrypoints.items()}
before = table()
cfgs = set(_registry._model_default_cfgs) if hasattr(_registry, "_model_default_cfgs") else set()
import dinovmf_plugin.host
after = table()
print(json.dumps({"changed": [n for n in before if after.get(n) != before[n]], "count": len(before)}))
"""


def test_timm_registry__means_afterwards_what_it_meant_before():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", _SNAPSHOT], capture_output=True, text=True, env=environment
    )
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["count"] > 500
    assert result["changed"] == []


def test_timm_create_model__after_the_import():
    """Upstream's registered twins ignore ``num_classes`` or know no pretrained weights."""
    model = timm.create_model("convnext_tiny", num_classes=7)
    assert type(model).__module__.startswith("timm.")
    assert model.num_classes == 7
    vit = timm.create_model("vit_small_patch16_224", num_classes=3, img_size=32)
    assert type(vit).__module__.startswith("timm.")
    assert _registry._model_entrypoints["convnext_tiny"].__module__.startswith("timm.")


def test_solo_absent__says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"solo-learn is not installed: `pip install --no-deps"):
        shims.import_solo()


def test_import_solo__second_time__same_module():
    assert shims.import_solo() is sys.modules["solo"]
