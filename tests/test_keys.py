"""docs/keys.md is what the classes say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_docs__are_current():
    reference = runpy.run_path(str(ROOT / "scripts" / "keys.py"))["reference"]
    written = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert reference() == written, "run python scripts/keys.py > docs/keys.md"
