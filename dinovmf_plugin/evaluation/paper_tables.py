"""Tables 6 and 7 of the paper (ICLR 2023, arXiv 2405.10939), in percent, to set beside ours."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PAPER_RETRIEVAL", "PAPER_VIDEO", "of_architecture"]

_B, _S = "vit_base/16", "vit_small/16"

#: (method, architecture) -> data set -> (medium mAP, hard mAP); face-blurred images.
PAPER_RETRIEVAL: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("DINO", _B): {"rparis6k": (63.7, 35.8), "roxford5k": (34.3, 10.8)},
    ("DINO-vMF", _B): {"rparis6k": (66.7, 39.5), "roxford5k": (37.3, 12.5)},
    ("iBOT", _B): {"rparis6k": (64.1, 36.6), "roxford5k": (35.2, 13.4)},
    ("iBOT-vMF", _B): {"rparis6k": (65.4, 38.1), "roxford5k": (38.1, 13.8)},
    ("MSN", _B): {"rparis6k": (56.3, 29.3), "roxford5k": (31.8, 11.8)},
    ("DINO", _S): {"rparis6k": (63.1, 34.5), "roxford5k": (34.6, 13.0)},
    ("DINO-vMF", _S): {"rparis6k": (62.1, 33.4), "roxford5k": (34.5, 12.6)},
    ("MSN", _S): {"rparis6k": (61.5, 33.3), "roxford5k": (36.6, 15.1)},
}
#: (method, architecture) -> (J&F, J, F) means on DAVIS-2017 val.
PAPER_VIDEO: dict[tuple[str, str], tuple[float, float, float]] = {
    ("DINO", _B): (62.4, 60.8, 64.0),
    ("DINO-vMF", _B): (63.4, 61.6, 65.2),
    ("iBOT", _B): (62.7, 61.8, 63.7),
    ("iBOT-vMF", _B): (63.1, 61.9, 64.2),
    ("MSN", _B): (58.0, 56.1, 60.0),
    ("DINO", _S): (61.8, 60.2, 63.4),
    ("DINO-vMF", _S): (62.7, 60.9, 64.5),
    ("MSN", _S): (59.6, 57.6, 61.6),
}


def of_architecture(
    keys: Iterable[tuple[str, str]], architecture: str | None
) -> list[tuple[str, str]]:
    """Rows of one architecture, or all where the paper has none of that name.

    Args:
        keys: one of the tables above.
        architecture: such as ``vit_small/16``.

    Example:
        >>> of_architecture(PAPER_VIDEO, "vit_small/16")[0]
        ('DINO', 'vit_small/16')
        >>> len(of_architecture(PAPER_VIDEO, "vit_tiny/16"))
        8
    """
    every = list(keys)
    return [key for key in every if key[1] == architecture] or every
