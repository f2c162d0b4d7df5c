"""Importing solo-learn of either generation on today's packages, and nothing else.

What the two generations need:

- 1.0.2 (PyPI, 2021) imports ``pytorch_lightning`` and a scheduler of ``pl_bolts``. Both are satisfied
  for the time of the import only, from ``lightning`` and from a scheduler with the same signature.
- Both overwrite entries of timm's model registry (``vit_small``, ``convnext_tiny`` ...): these are put
  back, so that ``timm.create_model`` means afterwards what it meant before.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["LinearWarmupCosineAnnealingLR", "import_solo"]


class LinearWarmupCosineAnnealingLR(LambdaLR):
    """Linear warm-up, then a cosine: the signature of ``pl_bolts`` that solo-learn 1.0.2 imports.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = LinearWarmupCosineAnnealingLR(optimizer, warmup_epochs=2, max_epochs=4)
        >>> scheduler.get_last_lr()
        [0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: int,
        max_epochs: int,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        from dinovmf_plugin.core.schedules import learning_rate

        def factor(peak: float, epoch: int) -> float:
            if not peak:
                return 1.0
            value = learning_rate(
                epoch, max_epochs, peak, eta_min, int(warmup_epochs), warmup_start_lr
            )
            return value / peak

        peaks = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer, [partial(factor, peak) for peak in peaks], last_epoch)


@contextlib.contextmanager
def _aliased_lightning() -> Iterator[None]:
    """Let ``import pytorch_lightning`` mean ``lightning.pytorch`` while solo-learn is imported.

    The Trainer that runs our methods is ``lightning``'s; a LightningModule of a separately installed
    ``pytorch_lightning`` would be refused by it.
    """
    import lightning.pytorch as pl
    import lightning.pytorch.callbacks
    import lightning.pytorch.loggers  # noqa: F401

    prefix, alias = "lightning.pytorch", "pytorch_lightning"
    saved = {k: v for k, v in sys.modules.items() if k == alias or k.startswith(alias + ".")}
    for name in saved:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name.startswith(prefix + "."):
            sys.modules[alias + name[len(prefix) :]] = module
    sys.modules[alias] = pl
    added: list[str] = []
    if importlib.util.find_spec("pl_bolts") is None:
        scheduler = types.ModuleType("pl_bolts.optimizers.lr_scheduler")
        scheduler.LinearWarmupCosineAnnealingLR = LinearWarmupCosineAnnealingLR  # type: ignore[attr-defined]
        for name in ("pl_bolts", "pl_bolts.optimizers"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[scheduler.__name__] = scheduler
        added = ["pl_bolts", "pl_bolts.optimizers", scheduler.__name__]
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name == alias or name.startswith(alias + ".") or name in added:
                del sys.modules[name]
        sys.modules.update(saved)


@contextlib.contextmanager
def _kept_timm_registry() -> Iterator[None]:
    from timm.models import _registry

    tables = {
        name: dict(value)
        for name, value in vars(_registry).items()
        if isinstance(value, dict) and name.startswith("_m")
    }
    try:
        yield
    finally:
        for name, table in tables.items():
            getattr(_registry, name).update(table)


def import_solo() -> types.ModuleType:
    """Import ``solo`` (with ``solo.methods``) of whichever generation is on the path.

    Raises:
        ImportError: if solo-learn is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("solo") is None:
        raise ImportError(
            "solo-learn is not installed: `pip install --no-deps solo-learn==1.0.2`, or put a checkout "
            "of solo-learn main on PYTHONPATH"
        )
    if "solo.methods" in sys.modules:
        return sys.modules["solo"]
    with warnings.catch_warnings(), _kept_timm_registry():
        warnings.simplefilter("ignore")
        with _aliased_lightning():
            importlib.import_module("solo.methods")
    return sys.modules["solo"]
