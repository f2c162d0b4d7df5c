"""The only room that imports solo-learn: one adapter per generation of the host, one face.

=================  =====================================================================
generation         what it is
=================  =====================================================================
``main``           GitHub, 1.0.3 and later: hydra configs, ``lightning``; the API the methods use
``release``        1.0.2 on PyPI: argparse; backported to main's API by ``host.release``
=================  =====================================================================

Every name below means the same on both: ``BaseMomentumMethod(cfg)`` with ``backbone`` and
``momentum_backbone``, ``METHODS``, ``build_method(cfg)``.
"""

from __future__ import annotations

import importlib.util

from dinovmf_plugin.host.shims import import_solo

solo = import_solo()
GENERATION = "main" if importlib.util.find_spec("solo.data") is not None else "release"

if GENERATION == "main":
    from dinovmf_plugin.host.main_branch import (
        BACKBONES,
        BaseMomentumMethod,
        HostCheckpointer,
        build_host_method,
    )
else:
    from dinovmf_plugin.host.release import (
        BACKBONES,
        BaseMomentumMethod,
        HostCheckpointer,
        build_host_method,
    )

from solo.methods import METHODS  # noqa: E402
from solo.utils.metrics import accuracy_at_k, weighted_mean  # noqa: E402

__all__ = [
    "BACKBONES",
    "GENERATION",
    "METHODS",
    "BaseMomentumMethod",
    "HostCheckpointer",
    "accuracy_at_k",
    "build_host_method",
    "weighted_mean",
]
