"""Command lines of ``python -m dinovmf_plugin import`` and ``export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dinovmf_plugin.checkpoints.report import LoadReport
from dinovmf_plugin.checkpoints.transfer import IMPORT_SOURCES, export_weights, import_weights
from dinovmf_plugin.runs.cli import one_clear_message

__all__ = ["export_main", "import_main"]


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--which",
        choices=("teacher", "student"),
        default="teacher",
        help="network to take; the papers evaluate the teacher (default)",
    )
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="resample position embeddings for N x N pixels"
    )
    parser.add_argument("--model-name", help="vit_tiny .. vit_huge, if heads cannot be inferred")
    parser.add_argument("--num-heads", type=int, help="attention heads, for other sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")


def _print(report: LoadReport, written: list[Path]) -> int:
    print(report)
    for path in written:
        print(f"wrote {path}")
    return 0


@one_clear_message
def import_main(argv: Sequence[str] | None = None) -> int:
    """``import --source dino|dinov2|ibot|msn|solo FILE --output OUT.safetensors``.

    Returns 0; bad input ends in one sentence and exit status 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dinovmf_plugin import",
        description="Convert a foreign checkpoint to timm-named safetensors and print what matched.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint to read")
    parser.add_argument(
        "--source", required=True, choices=IMPORT_SOURCES, help="project that wrote the file"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.safetensors", help="file to write"
    )
    _shared(parser)
    args = parser.parse_args(argv)
    return _print(
        *import_weights(
            args.file,
            args.output,
            source=args.source,
            which=args.which,
            model_name=args.model_name,
            num_heads=args.num_heads,
            img_size=args.img_size,
            overwrite=args.overwrite,
        ),
    )


@one_clear_message
def export_main(argv: Sequence[str] | None = None) -> int:
    """``export CHECKPOINT --output DIR [--torchscript] [--onnx]``.

    Returns 0; bad input ends in one sentence and exit status 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dinovmf_plugin export",
        description="Write a backbone for timm and the Hugging Face Hub.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file to read")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--head", action="store_true", help="also write the projection head")
    parser.add_argument("--torchscript", action="store_true", help="also write TorchScript")
    parser.add_argument("--onnx", action="store_true", help="also write ONNX")
    _shared(parser)
    args = parser.parse_args(argv)
    return _print(
        *export_weights(
            args.checkpoint,
            args.output,
            which=args.which,
            model_name=args.model_name,
            num_heads=args.num_heads,
            img_size=args.img_size,
            with_projection_head=args.head,
            torchscript=args.torchscript,
            onnx=args.onnx,
            overwrite=args.overwrite,
        ),
    )
