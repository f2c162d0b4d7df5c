"""The keys of solo-learn's own DINO, in a config whose only change is ``method=``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["read_solo_keys"]


def read_solo_keys(given: Mapping[str, Any], method: str, normalization: str) -> dict[str, Any]:
    """``method_kwargs`` as written for solo-learn's DINO, in this project's keys.

    ``norm_last_layer`` becomes ``normalization``: l2 where it is True, none where it is False. In a method
    whose normalization is vmf, False says what holds anyway: its norms are free. ``freeze_last_layer`` and
    ``clip_grad`` may be True or False, as solo-learn annotates them. All else is returned as it is.

    Args:
        given: the config's ``method_kwargs``.
        method: its ``method``, for messages.
        normalization: the method's own.

    Raises:
        ValueError: if ``norm_last_layer`` is neither True nor False, or contradicts the normalization.

    Example:
        >>> read_solo_keys({"norm_last_layer": True, "num_prototypes": 4096}, "dino_multicrop", "none")
        {'num_prototypes': 4096, 'normalization': 'l2'}
        >>> read_solo_keys({"norm_last_layer": False}, "dino_vmf", "vmf")
        {}
    """
    settings = dict(given)
    for key in ("clip_grad", "freeze_last_layer"):
        if isinstance(settings.get(key), bool):
            settings[key] = int(settings[key])
    fixed = settings.pop("norm_last_layer", None)
    if fixed is None:
        return settings
    if not isinstance(fixed, bool):
        raise ValueError(f"method_kwargs.norm_last_layer={fixed!r} must be True or False")
    chosen = settings.get("normalization")
    if chosen is None and normalization != "vmf":
        settings["normalization"] = "l2" if fixed else "none"
    elif fixed != ((chosen or normalization) == "l2"):
        what = "fixes the norms of the prototypes, which" if fixed else "frees the norms, which"
        does = "frees" if fixed else "fixes"
        whose = f"method={method}" if chosen is None else f"method_kwargs.normalization={chosen}"
        raise ValueError(
            f"method_kwargs.norm_last_layer={fixed} {what} {whose} {does}: leave it out"
            + (", or take method_kwargs.normalization=l2" if fixed else "")
        )
    return settings
