"""Hydra finds this package by itself: in every hydra app, the plugin's configs are at ``dinovmf/``.

``configs/`` itself is not on the shared search path: its folders (``data/``, ``method/`` ...) would turn
``data=...`` and ``method=...`` of every app into the choice of a group. It is there behind one name:

==========================  ==============================================================
in ``configs/``             on the search path of every hydra app
==========================  ==============================================================
``custom/dino_vmf``         ``--config-name dinovmf/custom/dino_vmf``
``augmentations=...``       ``dinovmf/augmentations=...``
==========================  ==============================================================

If the app has already imported solo-learn, its methods are registered too; otherwise nothing heavy is
imported, so other hydra apps in the environment pay about a millisecond. ``DINOVMF_PLUGIN_DISABLE=1``
turns both off.
"""

from __future__ import annotations

import logging
import os
import sys

from hydra._internal.core_plugins.importlib_resources_config_source import (
    ImportlibResourcesConfigSource,
)
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf

_NAME = "dinovmf"


def _below(path: str) -> str | None:
    """What follows ``dinovmf/``, ``""`` for ``dinovmf`` itself, None for anything else."""
    head, _, rest = path.strip("/").partition("/")
    return rest if head == _NAME else None


def _moved(entry: str) -> str:
    """An entry of a defaults list: a group of ``configs/`` named from the root is below ``dinovmf/`` now."""
    *keywords, group = entry.split(" ")
    if group.startswith("/") and not group.startswith("/hydra/"):
        group = f"/{_NAME}{group}"
    return " ".join([*keywords, group])


def _moved_defaults(defaults: ListConfig) -> ListConfig:
    return OmegaConf.create(
        [
            {_moved(str(key)): value for key, value in entry.items()}
            if isinstance(entry, dict)
            else _moved(str(entry))
            for entry in OmegaConf.to_container(defaults, resolve=False)
        ]
    )


class DinoVMFConfigSource(ConfigSource):
    """``dinovmf://PACKAGE``: the configs of a package, all of them behind the one name ``dinovmf/``."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._files = ImportlibResourcesConfigSource(provider, f"pkg://{self.path}")

    @staticmethod
    def scheme() -> str:
        """The part before ``://``."""
        return _NAME

    def available(self) -> bool:
        """Whether the package can be read."""
        return self._files.available()

    def is_group(self, config_path: str) -> bool:
        """Whether the path is the root, ``dinovmf`` or a folder below it."""
        below = _below(config_path)
        return not config_path.strip("/") or (below is not None and self._files.is_group(below))

    def is_config(self, config_path: str) -> bool:
        """Whether ``dinovmf/<path>`` is a config of the package."""
        below = _below(config_path)
        return bool(below) and self._files.is_config(str(below))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Groups and configs below a path; of the root ``dinovmf`` alone."""
        if not config_path.strip("/"):
            return [] if results_filter == ObjectType.CONFIG else [_NAME]
        below = _below(config_path)
        return [] if below is None else self._files.list(below, results_filter)

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a config; absolute groups of its defaults list (``/method``) become ``/dinovmf/method``."""
        below = _below(config_path)
        if not below:
            raise ConfigLoadError(f"Config not found : {config_path}")
        result = self._files.load_config(below)
        if isinstance(result.config, DictConfig) and "defaults" in result.config:
            result.config["defaults"] = _moved_defaults(result.config["defaults"])
        result.path = self.full_path()
        return result


class DinoVMFSearchPathPlugin(SearchPathPlugin):
    """Appends ``dinovmf://dinovmf_plugin.configs``; the app's own configs keep precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the plugin's configs (called by hydra before it composes)."""
        if not os.environ.get("DINOVMF_PLUGIN_DISABLE"):
            search_path.append(provider="dinovmf_plugin", path=f"{_NAME}://dinovmf_plugin.configs")


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
