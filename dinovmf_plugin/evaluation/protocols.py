"""The evaluations that ``scripts/evaluate.py`` knows: one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dinovmf_plugin.evaluation.knn import KNN
from dinovmf_plugin.evaluation.linear import LINEAR
from dinovmf_plugin.evaluation.logistic import FEW_SHOT, TRANSFER
from dinovmf_plugin.evaluation.protocol import Protocol
from dinovmf_plugin.evaluation.settings import DataSettings, EvaluationSettings
from dinovmf_plugin.runs.settings import build, check_type

__all__ = ["PROTOCOLS", "evaluation_settings"]

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (KNN, LINEAR, FEW_SHOT, TRANSFER)
}


def evaluation_settings(
    config: Mapping[str, Any], evaluations: Sequence[str] | None = None
) -> EvaluationSettings:
    """Read a resolved hydra config: common keys, ``data``, and one section per evaluation.

    Args:
        config: plain containers.
        evaluations: by default ``config["evaluations"]``.

    Raises:
        ValueError: for an unknown evaluation or key, or a value of the wrong type or that cannot work.
    """
    config = dict(config)
    given = config.pop("evaluations", ()) if evaluations is None else evaluations
    check_type("evaluations", given, Sequence[str])
    chosen = list(given)
    unknown = [name for name in chosen if name not in PROTOCOLS]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"evaluations={chosen} must be some of {list(PROTOCOLS)}, each once")
    sections = {
        name: build(protocol.settings, config.pop(name, {}) or {}, f"{name}.")
        for name, protocol in PROTOCOLS.items()
    }
    data = build(DataSettings, config.pop("data", {}) or {}, "data.")
    rest = {"evaluations": chosen, "sections": sections, "data": data}
    settings: EvaluationSettings = build(EvaluationSettings, config | rest, "")
    settings.check()
    return settings
