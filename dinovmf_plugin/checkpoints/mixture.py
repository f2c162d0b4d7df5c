"""The mixture of a head as plain tensors, for those who want neither this project nor its classes."""

from __future__ import annotations

import torch
from torch import Tensor

from dinovmf_plugin.checkpoints.heads import HeadSettings, head_from
from dinovmf_plugin.checkpoints.layouts import StoredWeights
from dinovmf_plugin.core.prototypes import Prototypes

__all__ = ["mixture_tensors"]


@torch.no_grad()
def _layer(prototypes: Prototypes, temperature: float, prefix: str = "") -> dict[str, Tensor]:
    kappa = prototypes.concentration(temperature)
    bias = prototypes.log_normalizer(temperature)
    return {
        f"{prefix}prototypes": prototypes.weight(),
        f"{prefix}kappa": kappa,
        f"{prefix}log_normalizer": torch.zeros_like(kappa) if bias is None else bias,
    }


def mixture_tensors(stored: StoredWeights) -> tuple[dict[str, Tensor], HeadSettings]:
    """Components of the mixture at the teacher's final temperature ``tau``, float32.

    With a unit vector ``y`` of the head, ``prototypes @ y / temperature + log_normalizer`` are the
    logits of Eqs. 3 and 6.

    Args:
        stored: weights with a head.

    Returns:
        ``prototypes`` ``w_k (K, p)``, ``kappa`` ``||w_k|| / tau (K,)``, ``log_normalizer``
        ``D(kappa_k) = log C_p(kappa_k) - log C_p(0) (K,)``, zeros where the method leaves it out (``none``,
        ``l2``), ``temperature`` ``tau ()``, and ``center (K,)`` where the file has one that fits; iBOT's
        separate patch prototypes as ``patch_prototypes``, ``patch_kappa`` and ``patch_log_normalizer``. And
        the head's settings.

    Raises:
        ValueError: see ``load_head``.
    """
    head, settings = head_from(stored)
    tau = settings.teacher_temperature
    tensors = {**_layer(head.last_layer, tau), "temperature": torch.tensor(tau)}
    if stored.center is not None and len(stored.center) == head.last_layer.num_prototypes:
        tensors["center"] = stored.center.float()
    if settings.patch_prototypes == "separate":
        patch, _ = head_from(stored, "patch")
        tensors |= _layer(patch.last_layer, tau, "patch_")
    return tensors, settings
