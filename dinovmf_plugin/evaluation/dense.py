"""The network for evaluations that need a ViT's tokens, not one feature per image."""

from __future__ import annotations

from dinovmf_plugin.checkpoints.layouts import Which
from dinovmf_plugin.core.vit import is_vit
from dinovmf_plugin.features.network import EvaluatedBackbone, load_evaluated

__all__ = ["load_evaluated_vit"]


def load_evaluated_vit(
    checkpoint: str | None,
    *,
    which: Which = "teacher",
    model_name: str | None = None,
    num_heads: int | None = None,
    seed: int = 0,
) -> EvaluatedBackbone:
    """``load_evaluated`` for Vision Transformers alone, in eval mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file or a name cannot be used, or it is no ViT (``pixels``).

    Example:
        >>> load_evaluated_vit("pixels")
        Traceback (most recent call last):
        ValueError: checkpoint=pixels has no patch tokens: a Vision Transformer is needed here
    """
    network = load_evaluated(
        checkpoint, which=which, model_name=model_name, num_heads=num_heads, seed=seed
    )
    if not is_vit(network.model):
        raise ValueError(
            f"checkpoint={checkpoint} has no patch tokens: a Vision Transformer is needed here"
        )
    network.model.eval()
    return network
