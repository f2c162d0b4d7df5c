"""Mixtures of von Mises-Fisher components: measures, EM in pure functions, and an estimator."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinovmf_plugin.mixture.estimator import VonMisesFisherMixture

__all__ = ["VonMisesFisherMixture"]


def __getattr__(name: str) -> Any:
    # on demand: training's monitor imports the measures and has no use for scikit-learn's clustering
    if name == "VonMisesFisherMixture":
        from dinovmf_plugin.mixture.estimator import VonMisesFisherMixture

        return VonMisesFisherMixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
