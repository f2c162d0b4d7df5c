"""The DALI graphs: one decode, then every crop of a recipe, on the CPU or the GPU.

Random numbers come in as inputs (see ``dali_feed``); the graphs only compute pixels, with the
operations of ``transforms.make_crop``:

* crop, antialiased resize and flip are one ``resize`` with a region of interest;
* color jitter and grayscale are one affine map of the pixels (see ``color``), clipped once;
* blur with PIL's radius as standard deviation; solarisation; equalisation; normalization to CHW
  float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import nvidia.dali.math as dali_math
from nvidia.dali import Pipeline, fn, pipeline_def, types

from dinovmf_plugin.data.dali.feed import input_names
from dinovmf_plugin.data.evaluation_loaders import CenterCrop
from dinovmf_plugin.data.recipe import Crop, Recipe

DEVICES = ("cpu", "gpu")
FLOAT = types.DALIDataType.FLOAT
_INTERPOLATION = {
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
}

Node = Any
"""A node of a DALI graph."""


Inputs = dict[str, Node]
"""Inputs of one crop, see ``dali_feed.input_names``."""


def _decode(encoded: Node, device: str) -> Node:
    # PIL does not turn pictures by their EXIF tag, so neither does DALI.
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,
    )


def _resize(image: Node, start: Node, end: Node, size: int, interpolation: str) -> Node:
    return fn.resize(
        image,
        size=[size, size],
        roi_start=start,
        roi_end=end,
        interp_type=_INTERPOLATION[interpolation],
        antialias=True,
    )


def _normalize(picture: Node, mean: Sequence[float], std: Sequence[float]) -> Node:
    return fn.crop_mirror_normalize(
        picture,
        dtype=FLOAT,
        output_layout="CHW",
        mean=[255.0 * value for value in mean],
        std=[255.0 * value for value in std],
    )


def _color(picture: Node, inputs: Inputs, device: str) -> Node:
    mean = fn.reshape(fn.reductions.mean(picture, axes=(0, 1)), shape=[1, 3])
    offset = fn.coord_transform(mean, M=inputs["mean_matrix"])
    if device == "cpu":
        mapped = fn.coord_transform(
            picture, M=inputs["pixel_matrix"], T=fn.reshape(offset, shape=[3])
        )
    else:
        # The offset is computed on the GPU, where it cannot be an argument of an operator.
        offset = fn.reshape(offset, shape=[1, 1, 3], layout="HWC")
        mapped = fn.coord_transform(picture, M=inputs["pixel_matrix"]) + offset
    return dali_math.clamp(mapped, 0.0, 255.0)


def _crop(image: Node, crop: Crop, inputs: Inputs, device: str) -> Node:
    """Graph of one crop; each ``if`` on an input becomes a conditional decided per image."""
    picture = _resize(image, inputs["start"], inputs["end"], crop.size, crop.interpolation)
    if crop.jitter_prob > 0 or crop.gray_prob > 0:
        if inputs["colored"]:
            picture = _color(picture, inputs, device)
        else:
            picture = fn.cast(picture, dtype=FLOAT)
    elif crop.blur_prob > 0 or crop.solarize_prob > 0 or crop.equalize_prob > 0:
        picture = fn.cast(picture, dtype=FLOAT)
    if crop.blur_prob > 0 and inputs["blurred"]:
        picture = fn.gaussian_blur(picture, sigma=inputs["radius"])
    if crop.solarize_prob > 0 and inputs["solarized"]:
        # Inverting from 128 on leaves the smaller of x and 255 - x.
        picture = dali_math.min(picture, 255 - picture)
    if crop.equalize_prob > 0 and inputs["equalized"]:
        picture = fn.cast(
            fn.equalize(fn.cast(picture, dtype=types.DALIDataType.UINT8)), dtype=FLOAT
        )
    return _normalize(picture, crop.mean, crop.std)


def crop_pipeline(
    source: Callable[[], tuple[Any, ...]],
    recipe: Recipe,
    *,
    device: str,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
) -> Pipeline:
    """Build the training pipeline.

    Args:
        source: callback that returns the inputs of a batch, see ``dali_feed.crop_inputs``.
        recipe: the crops.
        device: ``cpu`` or ``gpu``.
        batch_size: images per batch.
        num_threads: threads of the CPU part.
        device_id: index of the GPU, None without.

    Returns:
        A pipeline whose outputs are the crops, ``(B, 3, size, size)`` float32 each.
    """
    keys = [(n, name) for n, crop in enumerate(recipe) for name in input_names(crop)]
    slots = {key: slot for slot, key in enumerate(keys)}

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Node, ...]:
        encoded, *values = fn.external_source(source=source, num_outputs=1 + len(keys), batch=True)
        image = _decode(encoded, device)
        crops = []
        for n, crop in enumerate(recipe):
            inputs = {name: values[slots[n, name]] for name in input_names(crop)}
            crops.append(_crop(image, crop, inputs, device))
        return tuple(crops)

    return graph(batch_size=batch_size, num_threads=num_threads, device_id=device_id)


def center_crop_pipeline(
    source: Callable[[], tuple[Any, ...]],
    transform: CenterCrop,
    *,
    device: str,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
) -> Pipeline:
    """Build the evaluation pipeline; its one output is ``(B, 3, size, size)`` float32.

    Args:
        source: callback that returns the inputs of a batch, see ``dali_feed.center_inputs``.
        transform: resize and crop.
        device: ``cpu`` or ``gpu``.
        batch_size: images per batch.
        num_threads: threads of the CPU part.
        device_id: index of the GPU, None without.
    """

    @pipeline_def
    def graph() -> tuple[Node, ...]:
        encoded, start, end = fn.external_source(source=source, num_outputs=3, batch=True)
        picture = _resize(
            _decode(encoded, device), start, end, transform.size, transform.interpolation
        )
        return (_normalize(picture, transform.mean, transform.std),)

    return graph(batch_size=batch_size, num_threads=num_threads, device_id=device_id)


def decoding_pipeline(
    source: Callable[[], list[Any]], *, device: str, device_id: int | None
) -> Pipeline:
    """Build a pipeline that decodes one image: ``(1, H, W, 3)`` uint8.

    Args:
        source: callback that returns the file's bytes as a uint8 array, in a list.
        device: ``cpu`` or ``gpu``.
        device_id: index of the GPU, None without.
    """

    @pipeline_def
    def graph() -> Node:
        return _decode(fn.external_source(source=source, batch=True), device)

    return graph(batch_size=1, num_threads=1, device_id=device_id)
