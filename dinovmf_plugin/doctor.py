"""``dinovmf doctor``: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["Finding", "examine", "report"]

_NEEDED = ("torch", "torchvision", "lightning", "timm", "hydra-core", "scipy", "scikit-learn")
#: module -> what it is for, how to get it
_OPTIONAL = {
    "nvidia.dali": ("data.format=dali", 'pip install "dinovmf-plugin[dali]"'),
    "pyarrow": ("table=parquet", 'pip install "dinovmf-plugin[analysis]"'),
    "onnxruntime": ("export --onnx", 'pip install "dinovmf-plugin[export]"'),
    "wandb": ("wandb.enabled=True", "pip install wandb"),
    "umap": ("auto_umap.enabled=True", 'pip install "dinovmf-plugin[umap]"'),
    "h5py": ("data.format=h5", 'pip install "dinovmf-plugin[h5]"'),
}


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


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _host() -> Finding:
    try:
        from dinovmf_plugin import host, registry

        registry.register()
    except Exception as error:  # whatever an incomplete host raises is what the report is for
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding("solo-learn", False, told, "pip install --no-deps solo-learn==1.0.2")
    names = ", ".join(sorted(registry.method_classes()))
    where = Path(str(host.solo.__file__)).parent
    return Finding("solo-learn", True, f"{host.GENERATION} at {where}; registered: {names}")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", True, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    return Finding("GPU", None, "none that torch can use: training runs on the CPU")


def examine(folder: str | Path = ".") -> list[Finding]:
    """Look at packages, host, accelerator and disk.

    Args:
        folder: where runs will be written; its free space is told.

    Example:
        >>> {finding.name for finding in examine()} >= {"torch", "solo-learn", "GPU", "disk"}
        True
    """
    found = []
    for package in _NEEDED:
        try:
            found.append(Finding(package, True, version(package)))
        except PackageNotFoundError:
            found.append(Finding(package, False, "missing", f"pip install {package}"))
    found.append(_host())
    found.append(_accelerator())
    for module, (use, command) in _OPTIONAL.items():
        told = "there" if _has(module) else f"missing, needed for {use}"
        found.append(Finding(module, True if _has(module) else None, told, command))
    free = shutil.disk_usage(folder).free / 1e9
    told = f"{free:.0f} GB free at {Path(folder).resolve()}"
    found.append(Finding("disk", free > 5, told, "" if free > 5 else "free some space"))
    return found


def report(findings: list[Finding]) -> str:
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
