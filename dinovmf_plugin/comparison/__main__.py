"""Write the tables of a folder again: ``python -m dinovmf_plugin.comparison OUTPUT_DIR``."""

from __future__ import annotations

import argparse

from dinovmf_plugin.comparison.cells import cells_figure, check_picture, draw_picture
from dinovmf_plugin.comparison.charts import void_figure
from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.comparison.results import group_runs, read_results
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
    parser.add_argument("--void", help="draw how a void set forms over the epochs into such a file")
    args = parser.parse_args()
    for option in ("cells", "void"):
        if getattr(args, option) is not None:
            check_picture(f"--{option}", getattr(args, option))
    summary = collect(args.output_dir, args.against)
    groups = group_runs(read_results(args.output_dir))
    if args.cells is not None:
        draw_picture(lambda: cells_figure(groups, summary["headline"]), args.cells)
    if args.void is not None:
        draw_picture(lambda: void_figure(groups), args.void)


if __name__ == "__main__":
    main()
