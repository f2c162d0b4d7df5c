"""Registration with the host: idempotent, and nobody else's entry is touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dinovmf_plugin
from dinovmf_plugin import host, registry
from dinovmf_plugin.methods.base import SelfDistillation

OURS = {"dino_multicrop", "dino_vmf", "ibot", "ibot_vmf", "msn", "msn_vmf"}


def test_register__puts_the_methods_there_once():
    first = dinovmf_plugin.register()
    table = dict(host.METHODS)
    assert set(first) == OURS
    assert dinovmf_plugin.register() == first
    assert dict(host.METHODS) == table
    for name in first:
        assert host.METHODS[name] is registry.method_classes()[name]
        assert issubclass(host.METHODS[name], SelfDistillation)


def test_register__hosts_own_entries_unchanged():
    dinovmf_plugin.register()
    theirs = {name: cls for name, cls in host.METHODS.items() if name not in OURS}
    assert {"byol", "dino", "simclr", "swav", "mocov2plus"} <= set(theirs)
    for name, cls in theirs.items():
        assert cls.__module__.startswith("solo.methods."), name


def test_register__foreign_owner__refused_and_nothing_registered(monkeypatch):
    class Foreign:
        pass

    Foreign.__module__ = "other_plugin.methods"
    for name in OURS:
        monkeypatch.delitem(host.METHODS, name, raising=False)
    monkeypatch.setitem(host.METHODS, "dino_vmf", Foreign)
    with pytest.raises(
        ValueError, match=r"method='dino_vmf' is already registered by other_plugin"
    ):
        dinovmf_plugin.register()
    assert host.METHODS["dino_vmf"] is Foreign
    assert not (OURS - {"dino_vmf"}) & set(host.METHODS)


def test_package_import__imports_neither_torch_nor_solo():
    code = (
        "import sys, dinovmf_plugin\n"
        "print([m for m in ('torch', 'solo', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_layers__functional_cores_import_neither_host_nor_lightning():
    code = (
        "import sys\n"
        "from dinovmf_plugin import losses, mixture, report\n"
        "from dinovmf_plugin.core import centering, heads, prototypes, schedules, vit, vmf\n"
        "print([m for m in ('solo', 'lightning', 'pytorch_lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
