"""DINO-vMF and iBOT-vMF for solo-learn: DINO as a mixture of von Mises-Fisher components.

>>> import dinovmf_plugin
>>> dinovmf_plugin.__version__.count(".")
2

``dinovmf_plugin.register()`` puts ``dino_vmf`` and the others into solo-learn's ``METHODS``.
Importing this package imports neither torch nor solo-learn.
"""

from __future__ import annotations

from dinovmf_plugin._version import __version__

__all__ = ["__version__", "register"]


def register() -> list[str]:
    """Register the plugin's methods with solo-learn; idempotent.

    Returns:
        The names that are now in ``solo.methods.METHODS``.

    Raises:
        ImportError: if solo-learn cannot be imported.
        ValueError: if another package owns one of the names.
    """
    from dinovmf_plugin.registry import register as register_methods

    return register_methods()
