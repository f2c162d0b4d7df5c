"""Doctests: of the two adapters in host/ only the one for the installed generation can be imported."""

import importlib.util
from pathlib import Path

_solo = importlib.util.find_spec("solo")
_folder = Path(_solo.origin).parent if _solo and _solo.origin else Path()
_is_main = (_folder / "data").is_dir()
collect_ignore = [f"dinovmf_plugin/host/{'release' if _is_main else 'main_branch'}.py"]
