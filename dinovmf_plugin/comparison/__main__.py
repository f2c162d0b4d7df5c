"""Write the tables of a folder again: ``python -m dinovmf_plugin.comparison OUTPUT_DIR``."""

from __future__ import annotations

import argparse

from dinovmf_plugin.comparison.cells import check_picture, draw_cells
from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.runs.cli import one_clear_message


@one_clear_message
def main() -> None:
    """Collect what has finished so far; a sweep may still be running."""
    parser = argparse.ArgumentParser(
        prog="python -m dinovmf_plugin.comparison", description=__doc__
    )
    parser.add_argument("output_dir", help="of scripts/ablation.py or scripts/compare.py")
    parser.add_argument(
        "--against", help="name, as in the tables, of what the others are compared to"
    )
    parser.add_argument(
        "--cells",
        help="draw components in use and kNN of the six cells into this .svg, .png or .pdf",
    )
    args = parser.parse_args()
    if args.cells is not None:
        check_picture(args.cells)
    summary = collect(args.output_dir, args.against)
    if args.cells is not None:
        draw_cells(args.output_dir, summary["headline"], args.cells)


if __name__ == "__main__":
    main()
