"""The prototype layer: one linear layer whose bias depends on the prototypes' norms."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinovmf_plugin.core import vmf
from dinovmf_plugin.core.triton_use import triton_serves
from dinovmf_plugin.core.workspace import room

__all__ = ["NORMALIZATIONS", "Normalization", "Prototypes"]

Normalization = Literal["none", "l2", "vmf"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


class Prototypes(nn.Module):
    """K prototypes ``w_k = g_k v_k / ||v_k||`` on, or off, the unit sphere.

    ===========  ==========  =======================================  =================
    value        norms       logit                                    used by
    ===========  ==========  =======================================  =================
    ``none``     free        ``<w_k, y> / tau``                       DINO/iBOT ViT-S
    ``l2``       fixed to 1  ``<w_k, y> / tau``                       DINO/iBOT ViT-B, MSN
    ``vmf``      free        ``<w_k, y> / tau + D(|g_k| / tau)``      DINO-vMF, iBOT-vMF (Eqs. 6, 7)
    ===========  ==========  =======================================  =================

    The parameters keep the names and shapes of ``torch.nn.utils.weight_norm`` (``weight_g (K, 1)``,
    ``weight_v (K, p)``), so that official DINO and iBOT heads load as they are. ``weight_g`` starts
    at 1, hence ``vmf`` equals ``none`` up to a constant until the magnitudes move.

    Args:
        dim: bottleneck dimension ``p``.
        num_prototypes: number of components ``K``.
        normalization: ``none``, ``l2`` or ``vmf``.
        order: order of the vMF normalizer's expansion (see ``vmf.log_normalizer``).

    Raises:
        ValueError: for an unknown normalization, a non-positive size, or ``vmf`` with ``dim < 3``.

    Example:
        >>> layer = Prototypes(dim=8, num_prototypes=16, normalization="vmf")
        >>> y = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
        >>> layer(y, temperature=0.1).shape
        torch.Size([4, 16])
        >>> sorted(name for name, _ in layer.named_parameters())
        ['weight_g', 'weight_v']
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        normalization: Normalization = "none",
        order: int = 0,
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization={normalization!r} is unknown: choose one of {NORMALIZATIONS}"
            )
        if dim < 1 or num_prototypes < 1:
            raise ValueError(
                f"dim={dim} and num_prototypes={num_prototypes} must both be at least 1"
            )
        self.dim = dim
        self.num_prototypes = num_prototypes
        self.normalization = normalization
        self.order = order
        if normalization == "vmf":
            # raises now, not while training; on the CPU, since "meta" has no autocast to switch off
            vmf.log_normalizer(torch.zeros(1, device="cpu"), dim, order=order)
        linear = nn.Linear(dim, num_prototypes, bias=False)
        self.weight_v = nn.Parameter(linear.weight.detach().clone())
        self.weight_g = nn.Parameter(
            torch.ones(num_prototypes, 1), requires_grad=normalization != "l2"
        )

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # `module.bfloat16()` and Lightning's bf16-true would leave magnitudes near 1 in steps of 0.004 to
        # 0.008, more than an optimizer step: they follow the device and stay float32, as the center does.
        exact = self.weight_g.data
        super()._apply(fn, recurse)
        if self.weight_g.dtype != torch.float32:
            self.weight_g.data = exact.to(device=self.weight_g.device, dtype=torch.float32)
        return self

    def directions(self) -> Tensor:
        """Unit prototype directions ``mu_k``, ``(K, p)``; a negative magnitude flips the sign."""
        return F.normalize(self.weight_v.float(), dim=-1) * torch.where(
            self.weight_g < 0, -1.0, 1.0
        )

    def magnitudes(self) -> Tensor:
        """Prototype norms ``||w_k|| = |g_k|``, ``(K,)``.

        Taken from the magnitude parameter: the norm of ``g v / ||v||`` has the same value, but
        would send rounding noise into ``v``.
        """
        return self.weight_g.float().abs().squeeze(-1)

    def scale(self) -> Tensor:
        """``g_k / ||v_k||``, ``(K,)``: ``w_k = scale_k v_k``."""
        return self.weight_g.float().squeeze(-1) / self.weight_v.float().norm(dim=-1)

    def weight(self) -> Tensor:
        """Effective prototypes ``w_k``, ``(K, p)``."""
        return self.scale().unsqueeze(-1) * self.weight_v.float()

    def concentration(self, temperature: float) -> Tensor:
        """vMF concentrations ``kappa_k = ||w_k|| / tau``, ``(K,)``."""
        return self.magnitudes() / temperature

    def log_normalizer(self, temperature: float) -> Tensor | None:
        """``D(kappa_k)``, ``(K,)`` in float32 for ``vmf``; None otherwise."""
        if self.normalization != "vmf":
            return None
        if self.order == 0 and vmf.expands(self.dim) and triton_serves(self.weight_g):
            from dinovmf_plugin.core.vmf_kernel import FusedLogNormalizer

            return FusedLogNormalizer.apply(self.weight_g.squeeze(-1), temperature, self.dim)  # type: ignore[no-any-return]
        return vmf.log_normalizer(self.concentration(temperature), self.dim, order=self.order)

    def scores(self, y: Tensor) -> Tensor:
        """Raw scores ``<w_k, y>``, ``(..., K)`` in float32; the product follows autocast."""
        if torch.is_grad_enabled():
            product = F.linear(y, self.weight_v.to(y.dtype))
            with torch.autocast(y.device.type, enabled=False):
                return product.float() * self.scale()
        product = self.products(y)
        with torch.autocast(y.device.type, enabled=False):
            if product.dtype == torch.float32:
                return product.mul_(self.scale())
            scores = room(product.shape, torch.float32, y.device)
            return torch.mul(product, self.scale(), out=scores)

    @torch.no_grad()
    def products(self, y: Tensor) -> Tensor:
        """``<v_k, y>``, ``(..., K)`` in autocast's dtype, else in ``y``'s: ``scores`` before ``scale``."""
        half = torch.is_autocast_enabled(y.device.type)
        dtype = torch.get_autocast_dtype(y.device.type) if half else y.dtype
        with torch.autocast(y.device.type, enabled=False):
            # kept memory: fresh memory costs a CPU more than the arithmetic
            weight: Tensor = self.weight_v
            if weight.dtype != dtype:
                weight = room(weight.shape, dtype, y.device).copy_(weight)
            product = room((*y.shape[:-1], self.num_prototypes), dtype, y.device)
            rows = y.to(dtype).reshape(-1, self.dim)
            torch.mm(rows, weight.t(), out=product.view(-1, self.num_prototypes))
            return product

    def forward(self, y: Tensor, temperature: float = 1.0) -> Tensor:
        """Component logits ``<w_k, y> / tau + D(kappa_k)``, float32 (Eqs. 3 and 6).

        Args:
            y: unit vectors ``(..., p)``.
            temperature: ``tau``.

        Returns:
            Logits ``(..., K)``.
        """
        with torch.autocast(y.device.type, enabled=False):
            logits = self.scores(y) / temperature
            bias = self.log_normalizer(temperature)
            return logits if bias is None else logits + bias

    def extra_repr(self) -> str:
        """Sizes and switch, for ``print(module)``."""
        return (
            f"dim={self.dim}, num_prototypes={self.num_prototypes}, "
            f"normalization={self.normalization!r}, order={self.order}"
        )
