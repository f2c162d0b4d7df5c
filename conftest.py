"""Doctests: of the two adapters in host/ only the one for the installed generation can be imported."""

import importlib.util

_main = importlib.util.find_spec("solo") and importlib.util.find_spec("solo.data")
collect_ignore = [
    "dinovmf_plugin/host/release.py" if _main else "dinovmf_plugin/host/main_branch.py",
]
