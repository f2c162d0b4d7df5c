"""The evaluations that ``scripts/evaluate.py`` knows: one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any

from dinovmf_plugin.evaluation.knn import KNN
from dinovmf_plugin.evaluation.linear import LINEAR
from dinovmf_plugin.evaluation.logistic import FEW_SHOT, TRANSFER
from dinovmf_plugin.evaluation.protocol import Protocol
from dinovmf_plugin.evaluation.settings import EvaluationSettings
from dinovmf_plugin.runs.bounds import AtLeastOne, OneOf
from dinovmf_plugin.runs.settings import Doc, plain, read

__all__ = ["PROTOCOLS", "AllSettings", "Evaluations", "evaluation_settings"]

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (KNN, LINEAR, FEW_SHOT, TRANSFER)
}
Evaluations = Annotated[
    Sequence[Annotated[str, OneOf(PROTOCOLS)]], AtLeastOne, Doc("what is evaluated")
]

AllSettings: type[EvaluationSettings] = make_dataclass(
    "AllSettings",
    [
        ("evaluations", Evaluations),
        *((n, p.settings, field(default_factory=p.settings)) for n, p in PROTOCOLS.items()),
    ],
    bases=(EvaluationSettings,),
    frozen=True,
    kw_only=True,
)
AllSettings.__doc__ = "A whole run: common keys, ``data``, and one section per evaluation."


def evaluation_settings(
    config: Mapping[str, Any], evaluations: Sequence[str] | None = None, prefix: str = ""
) -> EvaluationSettings:
    """Read a hydra config: common keys, ``data``, and one section per evaluation.

    Args:
        config: hydra's, or plain containers.
        evaluations: by default ``config["evaluations"]``.
        prefix: of the keys in messages.

    Raises:
        ValueError: for an unknown evaluation or key, or a value of the wrong type or that cannot work.
    """
    chosen = {} if evaluations is None else {"evaluations": list(evaluations)}
    return read(AllSettings, {**plain(config), **chosen}, prefix)
