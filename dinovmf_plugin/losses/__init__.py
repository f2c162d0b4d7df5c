"""Losses as pure functions of embeddings, prototypes and targets."""

from dinovmf_plugin.losses.cross_entropy import prototype_cross_entropy

__all__ = ["prototype_cross_entropy"]
