"""``dinovmf doctor``: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dinovmf_plugin._version import __version__

__all__ = ["Finding", "doctor_main", "examine", "report"]

_PACKAGE = "dinovmf-plugin"
#: extra -> what it is for; those that are not here are for developers or are looked at on their own
_USES = {
    "analysis": "table=parquet",
    "cluster": "hydra/launcher=submitit_slurm and joblib",
    "export": "export --onnx and --push-to",
    "h5": "data.source=h5",
    "mlflow": "mlflow.enabled=True",
    "sources": "data.source=hfds and hfids",
    "tensorboard": "tensorboard.enabled=True",
    "umap": "auto_umap.enabled=True",
    "wandb": "wandb.enabled=True",
}
_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_SHARED, _ENOUGH_DISK = 1.0, 5.0  # GB; one worker's batches of ViT crops are some 0.1


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        fine: True, False where something needed is missing, None where it is only optional.
        told: what was found.
        remedy: the command that mends it, or an empty string.
    """

    name: str
    fine: bool | None
    told: str
    remedy: str = ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _install(what: str) -> str:
    return f'pip install "{what}"'


def _requirements() -> list[Requirement]:
    """Of this package, as its installed metadata tells.

    Raises:
        PackageNotFoundError: where it runs without being installed.
    """
    return [Requirement(line) for line in metadata(_PACKAGE).get_all("Requires-Dist") or []]


def _installed(requirement: Requirement) -> str | None:
    """The version that serves a requirement, or None."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return None
    return found if requirement.specifier.contains(found, prereleases=True) else None


def _needed(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    for wanted in requirements:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed(wanted)
        if found is not None:
            yield Finding(wanted.name, True, found)
            continue
        wanted.marker = None
        try:
            told = f"{version(wanted.name)}, which is not {wanted.specifier}"
        except PackageNotFoundError:
            told = "missing"
        yield Finding(wanted.name, False, told, _install(str(wanted)))


def _extras(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """One line for every extra that a user may want."""
    for extra, use in _USES.items():
        members = [
            wanted
            for wanted in requirements
            if wanted.marker is not None
            and re.search(rf"extra == ['\"]{extra}['\"]", str(wanted.marker))
        ]
        missing = [wanted.name for wanted in members if _installed(wanted) is None]
        if missing:
            told = f"missing {', '.join(missing)}, needed for {use}"
            yield Finding(f"[{extra}]", None, told, _install(f"{_PACKAGE}[{extra}]"))
        elif members:
            told = ", ".join(f"{wanted.name} {_installed(wanted)}" for wanted in members)
            yield Finding(f"[{extra}]", True, told)


def _host() -> Finding:
    try:
        from dinovmf_plugin import host, registry

        registry.register()
    except Exception as error:  # whatever an incomplete host raises is what the report is for
        remedy = "pip install --no-deps solo-learn==1.0.2"
        return Finding("solo-learn", False, _first_line(error), remedy)
    names = ", ".join(sorted(registry.method_classes()))
    folder = Path(str(host.solo.__file__)).parent
    which = "main" if host.GENERATION == "main" else f"release {version('solo-learn')}"
    return Finding("solo-learn", True, f"{which} at {folder}; registered: {names}")


def _accelerators() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", None, "none that torch can use: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        told = f"{found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        told += ", bf16" if found.major >= 8 else ", no bf16: precision=16-mixed"
        yield Finding(f"GPU {index}", True, told)


def _triton() -> Finding:
    """Whether a kernel of this package compiles and runs, where kernels are used."""
    import torch

    try:
        found = version("triton")
    except PackageNotFoundError:
        if not torch.cuda.is_available():
            return Finding("Triton", None, "not there, and not used without a GPU")
        told = "missing: the loss takes its slower path, performance.compile=True is refused"
        return Finding("Triton", None, told, "pip install triton")
    if not torch.cuda.is_available():
        return Finding("Triton", True, f"{found}, not used without a GPU")
    try:
        from dinovmf_plugin.core.vmf_kernel import FusedLogNormalizer

        FusedLogNormalizer.apply(torch.ones(8, device="cuda"), 0.1, 256)
        torch.cuda.synchronize()
    except Exception as error:
        told = f"{found}, but no kernel runs ({_first_line(error)}): set DINOVMF_TRITON=0"
        return Finding("Triton", None, told, "apt install gcc")
    return Finding("Triton", True, f"{found}, a kernel runs")


def _dali_command() -> str:
    import torch

    old = str(torch.version.cuda or "").startswith("12.")
    return _install(f"{_PACKAGE}[{'dali-cuda12' if old else 'dali'}]")


def _decodes(device: str) -> bool:
    """Whether a pipeline of DALI gives the pixels of a gray picture."""
    import numpy as np
    from PIL import Image

    from dinovmf_plugin.data.dali.pipeline import decoding_pipeline

    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (128, 128, 128)).save(buffer, "JPEG")
    encoded = [np.frombuffer(buffer.getvalue(), np.uint8)]
    index = 0 if device == "gpu" else None
    pipeline = decoding_pipeline(lambda: encoded, device=device, device_id=index)
    pipeline.build()
    (found,) = pipeline.run()
    pictures: Any = found.as_cpu() if device == "gpu" else found
    pixels = np.asarray(pictures.as_array())
    return pixels.shape == (1, 16, 24, 3) and bool((abs(pixels.astype(int) - 128) < 4).all())


def _dali() -> Finding:
    import torch

    try:
        import nvidia.dali as dali
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("nvidia")
        told = "missing" if absent else f"cannot be imported ({_first_line(error)})"
        return Finding("DALI", None, f"{told}, needed for data.format=dali", _dali_command())
    build = str(dali.__cuda_version__)
    told = f"{dali.__version__} for CUDA {build[:2]}"
    device = "gpu" if torch.cuda.is_available() else "cpu"
    try:
        fine = _decodes(device)
    except Exception as error:
        told += f", but it decodes no picture on the {device} ({_first_line(error)})"
        return Finding("DALI", None, told, _dali_command())
    if not fine:
        told += f", but a decoded picture has other pixels on the {device}"
        return Finding("DALI", None, told, _dali_command())
    return Finding("DALI", True, f"{told}, a picture was decoded on the {device}")


def _disk(folder: Path) -> Finding:
    place = folder.resolve()
    while not place.exists():  # a run makes its folder
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    remedy = "" if free > _ENOUGH_DISK else "free some space, or choose another checkpoint.dir"
    return Finding("disk", free > _ENOUGH_DISK, f"{free:.0f} GB free at {folder.resolve()}", remedy)


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding(str(_SHARED_MEMORY), True, "not there: this system shares memory otherwise")
    size = shutil.disk_usage(_SHARED_MEMORY).total / 1e9
    if size >= _ENOUGH_SHARED:
        return Finding(str(_SHARED_MEMORY), True, f"{size:.1f} GB")
    told = f"{size:.2f} GB, too little for data.num_workers above 0"
    return Finding(
        str(_SHARED_MEMORY), None, told, "docker run --shm-size=8g, or data.num_workers=0"
    )


def examine(folder: str | Path = ".") -> list[Finding]:
    """Look at versions, host, accelerators, loaders, disk and optional packages.

    Args:
        folder: where runs will be written; its free space is told.

    Example:
        >>> {finding.name for finding in examine()} >= {"python", "torch", "solo-learn", "disk"}
        True
    """
    found = [Finding("python", True, platform.python_version())]
    try:
        requirements = _requirements()
        found.append(Finding(_PACKAGE, True, __version__))
    except PackageNotFoundError:
        requirements = []
        told = f"{__version__}, not installed: its requirements are not known here"
        found.append(Finding(_PACKAGE, False, told, "pip install -e ."))
    needed = list(_needed(requirements))
    found += needed
    if any(finding.name == "torch" and finding.fine is False for finding in needed):
        return found  # nothing else can be looked at
    found += [_host(), *_accelerators(), _triton(), _dali(), _disk(Path(folder)), _shared_memory()]
    return [*found, *_extras(requirements)]


def report(findings: Sequence[Finding]) -> str:
    """The findings as text, one line each, remedies behind what is missing.

    Example:
        >>> lacking = Finding("timm", False, "missing", "pip install timm")
        >>> print(report([Finding("torch", True, "2.14"), lacking]))
        ok       torch  2.14
        MISSING  timm   missing: pip install timm
    """
    width = max(len(finding.name) for finding in findings)
    words = {True: "ok", False: "MISSING", None: "-"}
    lines = []
    for finding in findings:
        remedy = f": {finding.remedy}" if finding.remedy and finding.fine is not True else ""
        lines.append(
            f"{words[finding.fine]:<7}  {finding.name:<{width}}  {finding.told}{remedy}".rstrip()
        )
    return "\n".join(lines)


def doctor_main(argv: Sequence[str]) -> int:
    """``doctor [FOLDER] [--json]``; returns 1 if something that is needed is missing, else 0."""
    parser = argparse.ArgumentParser(
        prog="dinovmf doctor", description="What this machine has and lacks, and what installs it."
    )
    parser.add_argument(
        "folder", nargs="?", default=".", metavar="FOLDER", help="where runs will be written"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args(argv)
    findings = examine(args.folder)
    fine = not any(finding.fine is False for finding in findings)
    if args.json:
        listed = [asdict(finding) for finding in findings]
        print(json.dumps({"version": __version__, "fine": fine, "findings": listed}, indent=2))
    else:
        print(report(findings))
    return 0 if fine else 1
