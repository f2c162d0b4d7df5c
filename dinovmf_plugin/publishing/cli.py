"""The command line of ``dinovmf export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dinovmf_plugin.checkpoints.card import UNKNOWN_LICENSE
from dinovmf_plugin.checkpoints.cli import add_network_options, network_options, show_written
from dinovmf_plugin.checkpoints.transfer import export_weights
from dinovmf_plugin.publishing.hub import check_repository, push
from dinovmf_plugin.publishing.measured import measurements
from dinovmf_plugin.runs.cli import one_clear_message

__all__ = ["export_main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinovmf export",
        description=(
            "Write a folder that timm.create_model('local-dir:DIR') and the Hugging Face Hub take: weights, "
            "config.json, a model card, and the head with its mixture."
        ),
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file to read")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--head",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write the projection head and its mixture (default: if the file has them)",
    )
    parser.add_argument("--torchscript", action="store_true", help="also write TorchScript")
    parser.add_argument("--onnx", action="store_true", help="also write ONNX")
    parser.add_argument(
        "--results",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="JSON file of an evaluation, or a folder of them, for the card; what lies beside the "
        "checkpoint is found without (may be repeated)",
    )
    parser.add_argument(
        "--license",
        default=UNKNOWN_LICENSE,
        metavar="NAME",
        help="license of the weights, as the Hub writes it: mit, cc-by-nc-4.0, ... (default: unknown)",
    )
    parser.add_argument(
        "--push-to", metavar="OWNER/NAME", help="then create this model repository on the Hub"
    )
    parser.add_argument("--private", action="store_true", help="that only its owner sees")
    add_network_options(parser)
    return parser


@one_clear_message
def export_main(argv: Sequence[str] | None = None) -> int:
    """``export CHECKPOINT --output DIR [--torchscript] [--onnx] [--push-to OWNER/NAME]``.

    Returns 0; bad input ends in one sentence and exit status 2.
    """
    args = _parser().parse_args(argv)
    if args.push_to is not None:
        check_repository(args.push_to)
    elif args.private:
        raise ValueError("--private is about the repository of --push-to OWNER/NAME: give both")
    report, written = export_weights(
        args.checkpoint,
        args.output,
        with_projection_head=args.head,
        torchscript=args.torchscript,
        onnx=args.onnx,
        license_name=args.license,
        measure=partial(measurements, results=args.results),
        **network_options(args),
    )
    show_written(report, written)
    if args.push_to is not None:
        address = push(
            args.output,
            [str(path.relative_to(args.output)) for path in written],
            args.push_to,
            private=args.private,
            overwrite=args.overwrite,
        )
        print(f"uploaded to {address}")
    return 0
