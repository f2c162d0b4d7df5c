"""The paper's own numbers (ICLR 2023, arXiv 2405.10939), to set beside ours. In percent, ImageNet."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PAPER", "PaperRow", "paper_rows"]

ARCHITECTURES = {
    "vit_base/16": "ViT-Base/16",
    "vit_small/16": "ViT-Small/16",
    "vit_small/8": "ViT-Small/8",
}
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
FEW_SHOT = ("1 per class", "2 per class", "5 per class", "1 %")
FINE_TUNING = ("cifar10", "cifar100", "flowers102", "aircraft", "imagenet")


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


def _row(
    method: str,
    architecture: str,
    main: tuple[float | None, float | None, float | None],
    few_shot: tuple[float, ...] = (),
    few_shot_std: tuple[float, ...] = (),
    transfer: tuple[float, ...] = (),
    finetune: tuple[float, ...] = (),
) -> PaperRow:
    return PaperRow(
        method,
        architecture,
        *main,
        few_shot=dict(zip(FEW_SHOT, few_shot, strict=False)),
        few_shot_std=dict(zip(FEW_SHOT, few_shot_std, strict=False)),
        transfer=dict(zip((*TABLE_5, "average"), transfer, strict=False)),
        finetune=dict(zip(FINE_TUNING, finetune, strict=False)),
    )


_B, _S, _S8 = ARCHITECTURES.values()

PAPER: tuple[PaperRow, ...] = (
    _row(
        "DINO",
        _B,
        (76.11, 77.88, 78.17),
        (41.8, 51.9, 61.4, 67.2),
        (0.3, 0.6, 0.2),
        (57.7, 94.5, 96.9, 86.3, 74.8, 96.0, 81.6, 93.9, 68.5, 83.4),
        (99.1, 91.7, 98.8, 84.5, 83.6),
    ),
    _row(
        "DINO-vMF",
        _B,
        (77.40, 78.67, 78.81),
        (50.3, 59.3, 66.1, 70.4),
        (0.2, 0.4, 0.2),
        (57.3, 94.5, 97.1, 86.3, 74.8, 95.7, 82.5, 94.6, 68.7, 83.5),
        (99.2, 91.9, 98.9, 84.8, 83.6),
    ),
    _row(
        "iBOT",
        _B,
        (77.10, 79.33, 79.50),
        (46.0, 56.0, 64.7, 69.9),
        (0.3, 0.8, 0.3),
        (55.9, 94.7, 97.6, 87.4, 74.4, 95.4, 82.7, 93.8, 69.4, 83.5),
        (99.2, 92.2, 98.9, 85.1, 84.0),
    ),
    _row(
        "iBOT-vMF",
        _B,
        (78.66, 80.20, 80.27),
        (51.6, 61.1, 68.3, 72.3),
        (0.1, 0.7, 0.3),
        (58.1, 95.5, 98.0, 88.0, 74.7, 94.8, 83.6, 93.9, 70.2, 84.1),
        (99.2, 92.6, 98.8, 85.8, 84.1),
    ),
    _row(
        "MSN",
        _B,
        (73.33, 75.84, 74.80),
        (49.8, 58.9, 65.5, 69.1),
        (0.2, 0.4, 0.3),
        (51.0, 92.8, 96.9, 85.3, 73.7, 92.8, 80.0, 93.9, 66.8, 81.5),
    ),
    _row(
        "DINO",
        _S,
        (74.44, 76.09, 76.98),
        (38.9, 48.9, 58.5, 64.5),
        (0.4, 0.3, 0.1),
        (53.8, 93.1, 96.2, 83.5, 74.7, 94.7, 79.7, 93.8, 66.8, 81.8),
        (99.0, 90.5, 98.5, 84.2, 82.0),
    ),
    _row(
        "DINO-vMF",
        _S,
        (74.74, 76.19, 76.97),
        (39.2, 49.4, 59.1, 65.0),
        (0.6, 0.7, 0.2),
        (56.0, 93.7, 96.0, 83.9, 74.1, 95.0, 80.1, 93.9, 66.6, 82.1),
        (99.0, 90.7, 98.7, 85.0, 81.8),
    ),
    _row(
        "MSN",
        _S,
        (74.86, 76.20, 76.62),
        (47.1, 55.8, 62.8, 67.2),
        (0.1, 0.6, 0.3),
        (51.6, 93.1, 95.9, 82.9, 72.0, 93.3, 77.8, 92.8, 65.5, 80.5),
    ),
    _row("iBOT", _S, (75.20, None, 77.90), finetune=(99.1, 90.7, 98.6, 85.7, 82.3)),
    _row("DINO", _S8, (69.98, 72.75, 74.24)),
    _row("DINO-vMF", _S8, (70.41, 72.91, 74.14)),
)
"""The methods that this project implements; ViT-Small/8 after 40 epochs."""


def paper_rows(architecture: str | None) -> list[PaperRow]:
    """Rows of one architecture, or of all where the paper has none of that name.

    Args:
        architecture: as ``ViTShape.name`` says it, such as ``vit_base/16``.

    Example:
        >>> [row.knn for row in paper_rows("vit_small/8")]
        [69.98, 70.41]
    """
    name = ARCHITECTURES.get(architecture or "")
    return [row for row in PAPER if name is None or row.architecture == name]
