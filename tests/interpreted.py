"""Checks of Triton's kernels in its interpreter.

It is chosen when triton is imported, hence a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["assert_passes_interpreted"]


def assert_passes_interpreted(checks: Path) -> None:
    """Run the tests of the file ``checks`` with interpreted kernels on the CPU; all must pass."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-v", str(checks)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
