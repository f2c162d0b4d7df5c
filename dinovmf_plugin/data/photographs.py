"""Patches of photographs: which photograph is this patch from?

The left half of every photograph gives the patches to train on and to look neighbors up in, the right
half those to be recognized, so that no pixel is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["PHOTOGRAPHS", "patch_boxes", "read_patches"]

SHORT_SIDE = 200
PATCH = 40
TRAIN, HELD_OUT = 145, 30  # patches of a photograph

_MVTB = """
58060.png arucoboard.png building2-3.png butterfly.jpg church.jpg eiffel-1.png eiffel-2.png flowers1.png
flowers2.png flowers3.png flowers4.png flowers5.png flowers6.png flowers7.png flowers8.png flowers9.png
greenscreen.png image3.jpg lab-scene.png notre-dame.png parks.png road.png rocks2-l.png roof.png tags.png
tomato_124.png tomato_14.png tomato_35.png tomato_54.png walls-l.png yellowtargets.png
campus/P1070491.png campus/P1070494.png campus/P1070496.png campus/P1070498.png
"""
_SKIMAGE = """
astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg rocket.jpg
"""
PHOTOGRAPHS = {"mvtb-data": _MVTB.split(), "scikit-image": _SKIMAGE.split()}
"""Color photographs by the package that brings them; one picture of each stereo pair."""


def patch_boxes(
    width: int, height: int, count: int, held_out: int, seed: int, size: int = PATCH
) -> list[tuple[int, int, int, int]]:
    """Boxes ``(left, top, right, bottom)``: ``count`` in the left half, then ``held_out`` in the right.

    Example:
        >>> left, right = patch_boxes(300, 200, 1, 1, seed=0)
        >>> left[2] <= 150 <= right[0]
        True
    """
    rng = np.random.default_rng(seed)
    boxes = []
    for number, low, high in ((count, 0, width // 2), (held_out, (width + 1) // 2, width)):
        for _ in range(number):
            top = int(rng.integers(0, height - size + 1))
            left = int(rng.integers(low, high - size + 1))
            boxes.append((left, top, left + size, top + size))
    return boxes


def read_patches(
    files: Sequence[Path],
) -> tuple[list[str], list[str], list[bool], Callable[[int], Image.Image]]:
    """Patches of 40 pixels of photographs whose shorter side is scaled to 200.

    Args:
        files: one photograph each.

    Returns:
        Of every patch the name of its photograph, a name of its own and whether it is held out; and a
        function that makes the patch of a number.
    """

    @cache
    def photograph(index: int) -> Image.Image:
        picture = Image.open(files[index]).convert("RGB")
        scale = SHORT_SIDE / min(picture.size)
        shape = (round(picture.width * scale), round(picture.height * scale))
        return picture.resize(shape, Image.Resampling.BICUBIC)

    boxes = [
        patch_boxes(*photograph(index).size, TRAIN, HELD_OUT, seed=index)
        for index in range(len(files))
    ]
    each = TRAIN + HELD_OUT
    labels = [file.stem for file in files for _ in range(each)]
    names = [f"{file.stem}-{number:03d}" for file in files for number in range(each)]
    held_out = [number >= TRAIN for _ in files for number in range(each)]
    return labels, names, held_out, lambda i: photograph(i // each).crop(boxes[i // each][i % each])
