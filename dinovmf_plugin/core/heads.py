"""The projection head: MLP, bottleneck, unit sphere, prototypes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dinovmf_plugin.core.prototypes import Normalization, Prototypes

__all__ = ["DINOHead", "ProjectionHead"]


class ProjectionHead(nn.Module):
    """Projects features to unit vectors ``y``: MLP, bottleneck, l2 normalization.

    ``in_dim -> hidden -> ... -> bottleneck`` with GELU between linear layers (optionally BatchNorm),
    truncated-normal weights of std 0.02 and zero biases. Parameter names equal those of the official
    DINO head's MLP (``mlp.0.weight`` ..).

    Args:
        in_dim: feature size of the backbone.
        hidden_dim: width of the hidden layers (official: 2048).
        bottleneck_dim: ``p`` (official: 256).
        num_layers: linear layers of the MLP (official: 3).
        use_bn: BatchNorm after each hidden linear layer (DINO, iBOT: off; MSN: on).

    Raises:
        ValueError: if ``num_layers`` is below 1.

    Example:
        >>> import torch
        >>> head = ProjectionHead(32, hidden_dim=64, bottleneck_dim=16, use_bn=True)
        >>> y = head(torch.randn(4, 32))
        >>> y.shape, bool(torch.allclose(y.norm(dim=-1), torch.ones(4)))
        (torch.Size([4, 16]), True)
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers.append(nn.Linear(n_in, n_out))
            if i < num_layers - 1:
                if use_bn:
                    layers.append(nn.BatchNorm1d(n_out))
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.mlp.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(N, in_dim)`` (or ``(..., in_dim)`` without BatchNorm) to unit ``(.., p)``."""
        y = self.mlp(features)
        # 1e-12 underflows in float16; 1e-6 is what half precision needs and changes nothing else
        return F.normalize(y, dim=-1, eps=1e-6 if y.element_size() == 2 else 1e-12)


class DINOHead(ProjectionHead):
    """A projection head that holds the prototypes as ``last_layer``.

    Parameter names equal the official DINO head's (``mlp.0.weight`` .. ``last_layer.weight_v``).
    ``forward`` returns the bottleneck, not the K logits: losses stream over the prototypes, and
    nobody has to keep K numbers per image. Call ``head.last_layer(y, temperature)`` for logits.

    Args:
        in_dim: feature size of the backbone.
        hidden_dim: width of the hidden layers (official: 2048).
        bottleneck_dim: ``p`` (official: 256).
        num_prototypes: ``K`` (DINO 65536, iBOT 8192).
        normalization: ``none``, ``l2`` or ``vmf`` (see ``Prototypes``).
        num_layers: linear layers of the MLP (official: 3).
        use_bn: BatchNorm after each hidden linear layer.
        order: order of the vMF normalizer.

    Example:
        >>> import torch
        >>> head = DINOHead(32, hidden_dim=64, bottleneck_dim=16, num_prototypes=128)
        >>> y = head(torch.randn(4, 32))
        >>> y.shape, bool(torch.allclose(y.norm(dim=-1), torch.ones(4)))
        (torch.Size([4, 16]), True)

    Differs from upstream: the official module returns logits and decides ``norm_last_layer`` with a
    flag; here that flag is ``normalization="l2"``.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_prototypes: int = 65536,
        normalization: Normalization = "none",
        num_layers: int = 3,
        use_bn: bool = False,
        order: int = 0,
    ) -> None:
        super().__init__(in_dim, hidden_dim, bottleneck_dim, num_layers, use_bn)
        # Created after the init pass on purpose: directions keep torch's default Linear init.
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, normalization, order)
