"""The command line of ``dinovmf import``, and what ``export`` has in common with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin.checkpoints.report import LoadReport
from dinovmf_plugin.checkpoints.transfer import IMPORT_SOURCES, import_weights
from dinovmf_plugin.runs.cli import one_clear_message

__all__ = ["add_network_options", "import_main", "network_options", "show_written"]


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network of a file is meant."""
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


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``add_network_options`` read, as keywords of ``import_weights`` and ``export_weights``."""
    names = ("which", "model_name", "num_heads", "img_size", "overwrite")
    return {name: getattr(args, name) for name in names}


def show_written(report: LoadReport, written: list[Path]) -> int:
    """Print what was read and written; returns 0."""
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
        prog="dinovmf import",
        description="Convert a foreign checkpoint to timm-named safetensors and print what matched.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint to read")
    parser.add_argument(
        "--source", required=True, choices=IMPORT_SOURCES, help="project that wrote the file"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.safetensors", help="file to write"
    )
    add_network_options(parser)
    args = parser.parse_args(argv)
    return show_written(
        *import_weights(
            args.file,
            args.output,
            source=args.source,
            **network_options(args),
        ),
    )
