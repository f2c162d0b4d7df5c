"""``dinovmf doctor``: what a machine has and lacks, with machines that lack one thing each."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from dinovmf_plugin import doctor, registry
from dinovmf_plugin.__main__ import main
from dinovmf_plugin._version import __version__
from dinovmf_plugin.doctor import Finding, examine, report


def _found(findings=None):
    return {finding.name: finding for finding in findings or examine()}


@pytest.fixture
def requires(monkeypatch):
    """Factory: the package's requirements are these lines."""

    def are(*lines):
        monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(x) for x in lines])

    return are


def test_this_machine__has_what_is_needed(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "registered: dino_multicrop, dino_vmf" in told
    assert "GB free" in told
    lines = {line.split()[1]: line for line in told.splitlines()}
    assert lines["python"].endswith("{}.{}.{}".format(*sys.version_info))
    assert lines["lightning"].startswith("ok")
    generation = lines["solo-learn"].split()[2]
    assert generation in ("main", "release")


def test_json__is_the_same_report(capsys, tmp_path):
    place = tmp_path / "runs" / "not yet there"
    assert main(["doctor", str(place), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["version"], content["fine"]) == (__version__, True)
    listed = {entry["name"]: entry for entry in content["findings"]}
    assert set(listed) >= {"python", "torch", "solo-learn", "GPU", "Triton", "DALI", "disk"} - (
        {"GPU"} if torch.cuda.is_available() else set()
    )
    assert listed["disk"]["told"].endswith(str(place))
    assert not place.exists()
    assert set(listed["torch"]) == {"name", "fine", "told", "remedy"}


def test_missing_host__is_status_1_and_its_command(monkeypatch, capsys):
    def broken() -> None:
        raise ImportError("No module named 'solo'\nand more")

    monkeypatch.setattr(registry, "register", broken)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "MISSING  solo-learn" in told
    assert "No module named 'solo': pip install --no-deps solo-learn==1.0.2\n" in told
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fine"] is False


def test_requirements__missing_or_too_old_have_their_command(requires):
    requires(
        "numpy",
        "no-such-package>=2; python_version > '3'",
        "scipy>=1000",
        "never-there; python_version < '3'",
    )
    found = _found()
    assert found["numpy"].fine is True
    assert found["no-such-package"] == Finding(
        "no-such-package", False, "missing", 'pip install "no-such-package>=2"'
    )
    assert found["scipy"].fine is False
    assert found["scipy"].told.endswith(", which is not >=1000")
    assert found["scipy"].remedy == 'pip install "scipy>=1000"'
    assert "never-there" not in found


def test_without_torch__nothing_that_needs_it_is_asked(requires):
    requires("torch>=1000")
    assert [finding.name for finding in examine()] == ["python", "dinovmf-plugin", "torch"]


def test_extras__are_optional_and_named_with_what_they_serve(requires):
    requires(
        'no-such-package; extra == "wandb"',
        'numpy; extra == "h5"',
        'scipy; extra == "cluster"',
        'also-missing>=1; extra == "cluster"',
        'not-for-users; extra == "dev"',
    )
    found = _found()
    assert found["[wandb]"] == Finding(
        "[wandb]",
        None,
        "missing no-such-package, needed for wandb.enabled=True",
        'pip install "dinovmf-plugin[wandb]"',
    )
    assert found["[h5]"].fine is True
    assert found["[cluster]"].told.startswith("missing also-missing, needed for hydra/launcher")
    assert "[dev]" not in found
    assert "[umap]" not in found
    assert all(finding.fine is not False for finding in found.values())


def test_dali__absent_broken_or_with_other_pixels_is_optional(monkeypatch):
    pytest.importorskip("nvidia.dali")
    fine = doctor._dali()
    assert fine.fine is True
    assert "for CUDA" in fine.told
    assert "a picture was decoded on the " in fine.told

    monkeypatch.setattr(doctor, "_decodes", lambda device: False)
    assert "but a decoded picture has other pixels" in doctor._dali().told

    def fails(device: str) -> bool:
        raise RuntimeError("no codec\nat some address")

    monkeypatch.setattr(doctor, "_decodes", fails)
    found = doctor._dali()
    assert found.fine is None
    assert "decodes no picture on the" in found.told
    assert found.told.endswith("(no codec)")

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delattr("nvidia.dali", raising=False)
    found = doctor._dali()
    assert found.fine is None
    assert found.told == "missing, needed for data.format=dali"
    for cuda, extra in (("13.0", "dali"), ("12.8", "dali-cuda12"), (None, "dali")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert doctor._dali().remedy == f'pip install "dinovmf-plugin[{extra}]"'


def test_gpu__name_memory_and_bf16(monkeypatch):
    cards = [SimpleNamespace(name="Some Card", total_memory=80e9, major=n) for n in (7, 8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first, second = doctor._accelerators()
    assert (first.name, second.name) == ("GPU 0", "GPU 1")
    assert first.told == "Some Card, 80 GB, CUDA 13.0, no bf16: precision=16-mixed"
    assert second.told == "Some Card, 80 GB, CUDA 13.0, bf16"


def test_triton__that_runs_no_kernel_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "3.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(torch, "ones", fails)
    found = doctor._triton()
    assert found.fine is None
    assert found.told == (
        "3.0, but no kernel runs (Failed to find C compiler): set DINOVMF_TRITON=0"
    )


@pytest.mark.parametrize(("free", "fine"), [(2e9, False), (2e12, True)])
def test_disk__that_is_full_is_status_1(monkeypatch, free, fine):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    found = doctor._disk(doctor.Path("."))
    assert found.fine is fine
    assert found.told.startswith(f"{free / 1e9:.0f} GB free at ")
    assert bool(found.remedy) is not fine


def test_shared_memory__of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(total=64e6))
    found = doctor._shared_memory()
    assert found.fine is None
    assert found.told == "0.06 GB, too little for data.num_workers above 0"
    assert "--shm-size=8g" in found.remedy
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "absent")
    assert doctor._shared_memory().fine is True


def test_report__optional_parts_are_no_failure():
    lines = report([Finding("wandb", None, "missing, needed for x", "pip install wandb")])
    assert lines == "-        wandb  missing, needed for x: pip install wandb"


def test_unknown_option__is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--jsno"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --jsno" in capsys.readouterr().err
