"""Write the tables of a folder again: ``python -m dinovmf_plugin.comparison OUTPUT_DIR``."""

from __future__ import annotations

import argparse

from dinovmf_plugin.comparison.collect import collect
from dinovmf_plugin.runs.cli import one_clear_message


@one_clear_message
def main() -> None:
    """Collect what has finished so far; a sweep may still be running."""
    parser = argparse.ArgumentParser(
        prog="python -m dinovmf_plugin.comparison", description=__doc__
    )
    parser.add_argument("output_dir", help="of scripts/ablation.py or scripts/compare.py")
    collect(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
