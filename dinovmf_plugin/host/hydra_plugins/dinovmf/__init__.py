"""Hydra finds this package by itself: it adds the plugin's configs to every hydra app's search path.

If the app has already imported solo-learn, its methods are registered too; otherwise nothing heavy is
imported, so other hydra apps in the environment pay about a millisecond. ``DINOVMF_PLUGIN_DISABLE=1``
turns both off.
"""

from __future__ import annotations

import logging
import os
import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class DinoVMFSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://dinovmf_plugin.configs``; the app's own configs keep precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the plugin's configs (called by hydra before it composes)."""
        if not os.environ.get("DINOVMF_PLUGIN_DISABLE"):
            search_path.append(provider="dinovmf_plugin", path="pkg://dinovmf_plugin.configs")


def _register_if_solo_is_loaded() -> None:
    # hydra scans its plugins before the app's main function runs and after its imports
    if os.environ.get("DINOVMF_PLUGIN_DISABLE") or "solo.methods" not in sys.modules:
        return
    try:
        import dinovmf_plugin

        dinovmf_plugin.register()
    except Exception as error:  # an exception here would end every hydra app in the environment
        logging.getLogger("dinovmf_plugin").warning("methods were not registered: %s", error)


_register_if_solo_is_loaded()
