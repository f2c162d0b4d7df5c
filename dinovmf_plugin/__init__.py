"""DINO-vMF and iBOT-vMF for solo-learn: DINO as a mixture of von Mises-Fisher components.

>>> import dinovmf_plugin as dv
>>> dv.__version__.count(".")
2

``dv.register()`` puts ``dino_vmf`` and the others into solo-learn's ``METHODS``; ``dv.pretrain`` trains
without a solo-learn clone, ``dv.embed``, ``dv.knn_accuracy`` and ``dv.analyze`` take what it returns, and
``dv.load_backbone`` and ``dv.load_head`` give the networks. Importing this package imports neither torch nor
solo-learn: the other names are found when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dinovmf_plugin._version import __version__

if TYPE_CHECKING:
    from dinovmf_plugin.api import EmbeddedImages, Run, analyze, embed, knn_accuracy, pretrain
    from dinovmf_plugin.checkpoints.heads import load_head
    from dinovmf_plugin.checkpoints.loading import load_backbone

__all__ = [
    "EmbeddedImages",
    "Run",
    "__version__",
    "analyze",
    "embed",
    "knn_accuracy",
    "load_backbone",
    "load_head",
    "pretrain",
    "register",
]

_PLACES = {
    "load_backbone": "checkpoints.loading",
    "load_head": "checkpoints.heads",
    **dict.fromkeys(
        ("EmbeddedImages", "Run", "analyze", "embed", "knn_accuracy", "pretrain"), "api"
    ),
}

if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> list[str]:
    """Register the plugin's methods with solo-learn; idempotent.

    Returns:
        The names that are now in ``solo.methods.METHODS``.

    Raises:
        ImportError: if solo-learn cannot be imported.
        ValueError: if another package owns one of the names.

    Example:
        >>> "dino_vmf" in register()
        True
    """
    from dinovmf_plugin.registry import register as register_methods

    return register_methods()
