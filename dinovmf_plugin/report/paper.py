"""The paper's own numbers (ICLR 2023, arXiv 2405.10939), read from ``paper.yaml``, to set beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["TABLE_5", "AblationCell", "PaperRow", "method_label", "paper_ablation", "paper_rows"]

TABLE_5 = (
    "aircraft",
    "caltech101",
    "cifar10",
    "cifar100",
    "dtd",
    "flowers102",
    "food101",
    "pets",
    "sun397",
)
_FAMILIES = {"ibot": "iBOT", "msn": "MSN", "dinov2": "DINOv2", "dino": "DINO"}


@dataclass(frozen=True)
class PaperRow:
    """What the paper reports for one method and architecture; None or absent where it does not.

    Attributes:
        method: the paper's name.
        architecture: the paper's name.
        knn: Tables 2 and 9-11.
        cls: linear [C], the same tables.
        dino: linear [D], the same tables.
        few_shot: Table 3 (means).
        few_shot_std: Tables 12 and 13, over three splits.
        transfer: Table 5 and its average (``average``).
        finetune: Tables 14 and 15; Aircraft is mean per class.
        retrieval: Table 6, (medium, hard) mAP per data set.
        video: Table 7, (J&F, J, F).
        utilization: Table 4, (unique prototypes, largest duplicate set).
    """

    method: str
    architecture: str
    knn: float | None = None
    cls: float | None = None
    dino: float | None = None
    few_shot: dict[str, float] = field(default_factory=dict)
    few_shot_std: dict[str, float] = field(default_factory=dict)
    transfer: dict[str, float] = field(default_factory=dict)
    finetune: dict[str, float] = field(default_factory=dict)
    retrieval: dict[str, tuple[float, float]] = field(default_factory=dict)
    video: tuple[float, float, float] | None = None
    utilization: tuple[int, int] | None = None

    def label(self, data: str = "ImageNet") -> str:
        """Name of the row in a table that also has rows of ours.

        Example:
            >>> PaperRow("DINO", "ViT-Base/16").label()
            'DINO ViT-Base/16, paper (ImageNet)'
        """
        return f"{self.method} {self.architecture}, paper ({data})"


@dataclass(frozen=True)
class AblationCell:
    """One cell of Table 1: ImageNet kNN top-1, ViT-S/16, 100 epochs.

    Attributes:
        mean: Table 1, of two runs.
        seeds: Table 8, the runs with seeds 0 and 42.
    """

    mean: float
    seeds: tuple[float, float]


@lru_cache(maxsize=1)
def _numbers() -> dict[str, Any]:
    content = files("dinovmf_plugin.report").joinpath("paper.yaml").read_text(encoding="utf-8")
    numbers: dict[str, Any] = yaml.safe_load(content)
    return numbers


def paper_rows(architecture: str | None) -> list[PaperRow]:
    """Rows of one architecture, or of all where the paper has none of that name.

    Args:
        architecture: as ``ViTShape.name`` says it, such as ``vit_base/16``.

    Example:
        >>> [row.knn for row in paper_rows("vit_small/8")]
        [69.98, 70.41]
        >>> paper_rows("vit_small/16")[0].video
        (61.8, 60.2, 63.4)
    """
    numbers = _numbers()
    names = numbers["architectures"]
    return [
        PaperRow(
            **{
                **row,
                "architecture": names[row["architecture"]],
                "retrieval": {k: tuple(v) for k, v in row.get("retrieval", {}).items()},
                "video": tuple(row["video"]) if "video" in row else None,
                "utilization": tuple(row["utilization"]) if "utilization" in row else None,
            }
        )
        for row in numbers["rows"]
        if architecture not in names or row["architecture"] == architecture
    ]


def paper_ablation() -> dict[tuple[str, str], AblationCell]:
    """Tables 1 and 8: (normalization, centering) to its cell.

    Example:
        >>> paper_ablation()["vmf", "probability"].mean
        70.87
    """
    return {
        (cell["normalization"], cell["centering"]): AblationCell(
            cell["mean"], (cell["seeds"][0], cell["seeds"][1])
        )
        for cell in _numbers()["ablation"]
    }


def method_label(config: Mapping[str, Any], source: str) -> str:
    """The paper's name of the method that wrote a checkpoint, from its stored config.

    Example:
        >>> method_label({"method": "dino_vmf", "method_kwargs": {"normalization": "vmf"}}, "")
        'DINO-vMF'
        >>> method_label({}, "ibot")
        'iBOT'
    """
    method = str(config.get("method") or source).lower()
    kwargs = config.get("method_kwargs")
    family = next((name for key, name in _FAMILIES.items() if key in method), None)
    if family is None:
        return "checkpoint"
    if not isinstance(kwargs, Mapping) or "normalization" not in kwargs:
        return f"{family}-vMF" if "vmf" in method else family
    return f"{family}-vMF" if kwargs["normalization"] == "vmf" else family
