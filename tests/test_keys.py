"""docs/keys.md is what the classes say."""

from __future__ import annotations

from pathlib import Path

from dinovmf_plugin.commands import key_reference

ROOT = Path(__file__).parents[1]


def test_docs__are_current():
    written = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert key_reference() == written, "run dinovmf keys > docs/keys.md"
