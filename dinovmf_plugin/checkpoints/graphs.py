"""TorchScript and ONNX files, written only after their outputs were compared with the network's."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dinovmf_plugin.runs.files import replacing

__all__ = ["TOLERANCE", "require_onnx", "write_onnx", "write_torchscript"]

TOLERANCE = 1e-5
"""Largest difference that passes, relative to the largest feature: float32 sums in another order."""

Size = tuple[int, int, int]
"""Channels, height and width of the images."""

_BATCHES = (1, 3)  # neither is the size that the graphs are made with: the batch must stay free


def require_onnx() -> None:
    """Check the optional packages before any work.

    Raises:
        ImportError: names the packages that are absent and how to get them.
    """
    names = ("onnx", "onnxscript", "onnxruntime")
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"--onnx needs {', '.join(absent)}: pip install 'dinovmf-plugin[export]' (onnxruntime is "
            "what the outputs are compared with)"
        )


def _images(shape: Size, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=generator)


def _compare(model: nn.Module, shape: Size, run: Callable[[Tensor], Tensor], what: str) -> None:
    for batch in _BATCHES:
        images = _images(shape, batch)
        wanted, got = model(images), run(images)
        if wanted.shape != got.shape:
            raise ValueError(
                f"the {what} gives {tuple(got.shape)} instead of {tuple(wanted.shape)}: not written"
            )
        error = float((wanted - got).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE:
            raise ValueError(
                f"the {what} differs from the network by {error:.1e} of its largest feature, more "
                f"than {TOLERANCE:.0e}: not written"
            )


@torch.no_grad()
def write_torchscript(model: nn.Module, shape: Size, path: Path) -> None:
    """Trace ``model``, compare the reloaded file's outputs, then put it at ``path``.

    Raises:
        ValueError: if the outputs differ by more than ``TOLERANCE``; nothing is written.
    """
    with replacing(path) as draft:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracer and deprecation notes; the comparison decides
            torch.jit.save(torch.jit.trace(model, _images(shape, 2)), str(draft))
            traced = torch.jit.load(str(draft))
        _compare(model, shape, traced, "TorchScript file")


@torch.no_grad()
def write_onnx(model: nn.Module, shape: Size, path: Path) -> None:
    """Write ONNX (input ``images``, output ``features``, free batch), compare, then put it at ``path``.

    Raises:
        ImportError: see ``require_onnx``.
        ValueError: if the outputs differ by more than ``TOLERANCE``; nothing is written.
    """
    require_onnx()
    import onnxruntime

    with replacing(path) as draft:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (_images(shape, 2),),
                str(draft),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        _compare(model, shape, run, "ONNX file")
