"""When a training's records mean collapse, and what to change then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LEAST_SHARE", "Alarm", "CollapseWarning", "CollapseWatch", "void_set_alarm"]

LEAST_SHARE = 0.03
"""Share of log K below which targets (or students) carry next to no information."""
_LOST_PART = 0.25
_UNIFORM_ENTROPY = 0.5  # of log K: between targets that are all spread out and all one-hot
_ONE_COMPONENT = 0.95
_VOID_SHARE = 0.5
_VOID_COSINE = -0.9

_UNIFORM_ADVICE = (
    "Lower optimizer.lr (to a quarter) and raise momentum.base_tau (0.996 for a few thousand steps); if "
    "crops.png in the run's folder shows local crops that a person could not place either, make them "
    "larger (rrc.crop_min_scale and crop_max_scale of the augmentations)"
)
_ONE_COMPONENT_ADVICE = (
    "Raise the teacher temperature (method_kwargs.teacher_temperature), let the center follow faster "
    "(method_kwargs.center_momentum, 0.9), lower optimizer.lr, or use normalization=vmf with "
    "centering=probability, under which a prototype cannot win by its norm alone"
)
_VOID_ADVICE = (
    "These components win no image, so fewer prototypes are really used. Use "
    "method_kwargs.normalization=vmf with centering=probability (DINO-vMF forms no void set), or spread "
    "them with method_kwargs.prototype_spread=0.1, or use fewer prototypes "
    "(method_kwargs.num_prototypes)"
)


class CollapseWarning(UserWarning):
    """Training goes wrong in a way that the loss alone does not show."""


@dataclass(frozen=True)
class Alarm:
    """A diagnosis.

    Attributes:
        name: ``uniform_collapse``, ``one_component_collapse``, ``information_lost`` or ``void_set``.
        message: what was seen and what to change.
    """

    name: str
    message: str


def _information(record: Mapping[str, float]) -> float:
    """Share of log K that the targets carry or, where only the loss is known, that a student can.

    ``H(mean target) - cross-entropy <= log K - cross-entropy`` bounds the student's share.
    """
    share = record.get("target_information_share", math.nan)
    return 1 - record.get("loss_over_log_k", math.nan) if math.isnan(share) else share


def _uniform(record: Mapping[str, float], entropy_share: float) -> str | None:
    loss, share = record.get("loss_over_log_k", math.nan), _information(record)
    if _one_component(record, entropy_share):
        return None
    if share < LEAST_SHARE:
        known = "target_information_share" in record
        what = "the targets carry" if known else "the student can carry at most"
        return f"{what} {max(share, 0):.1%} of log K about the image"
    if loss > 1 - LEAST_SHARE:
        return f"the loss is {loss:.1%} of log K: the student's output is all but uniform"
    return None


def _one_component(record: Mapping[str, float], entropy_share: float) -> str | None:
    share = record.get("batch_largest_win_share", math.nan)
    # the arg-max of uniform targets is always the first prototype: that is the other collapse
    if share > _ONE_COMPONENT and not entropy_share > _UNIFORM_ENTROPY:
        return f"one prototype is the target of {share:.0%} of the images"
    return None


_ADVICE = {
    "uniform_collapse": _UNIFORM_ADVICE,
    "information_lost": _UNIFORM_ADVICE,
    "one_component_collapse": _ONE_COMPONENT_ADVICE,
}


class CollapseWatch:
    """Counts how many records in a row show a collapse, and speaks up once per collapse.

    ``uniform_collapse``: targets carry less than 3 % of log K about the image, or the loss is above 97 %
    of log K. ``information_lost``: they carry less than a quarter of what they once did.
    ``one_component_collapse``: one prototype is the target of more than 95 % of a batch.

    Args:
        num_prototypes: ``K``.
        patience: records in a row before an alarm.

    Example:
        >>> watch = CollapseWatch(num_prototypes=4, patience=2)
        >>> record = {"target_information_share": 0.01}
        >>> [alarm.name for _ in range(4) for alarm in watch.update(record)]
        ['uniform_collapse']
    """

    def __init__(self, num_prototypes: int, patience: int = 10) -> None:
        self.log_k = math.log(num_prototypes)
        self.patience = patience
        self.streaks = dict.fromkeys(_ADVICE, 0)
        self.peak = 0.0

    def update(self, record: Mapping[str, float], *, warm: bool = True) -> list[Alarm]:
        """Take in one record.

        Args:
            record: ``target_information_share, loss_over_log_k, teacher_entropy`` (nats),
                ``batch_largest_win_share``; values that are missing or NaN are signs of nothing.
            warm: whether the warm-up is over; before that only a single component is a collapse.

        Returns:
            The alarms that this record sets off.
        """
        seen = self._signs(record)
        if not warm:
            seen |= {"uniform_collapse": None, "information_lost": None}
        alarms = []
        for name, sign in seen.items():
            self.streaks[name] = self.streaks[name] + 1 if sign else 0
            if self.streaks[name] == self.patience:
                if name == "information_lost" and self.streaks["uniform_collapse"] >= self.patience:
                    continue  # said already
                title = name.replace("_", " ")
                message = f"{title}, {self.patience} records in a row: {sign}. {_ADVICE[name]}."
                alarms.append(Alarm(name, message))
        return alarms

    def _signs(self, record: Mapping[str, float]) -> dict[str, str | None]:
        share = _information(record)
        entropy = record.get("teacher_entropy", math.nan)
        entropy_share = entropy / self.log_k if self.log_k else math.nan
        lost = None
        if share < _LOST_PART * self.peak:
            lost = (
                f"the targets carry {share:.1%} of log K about the image, less than a quarter of the "
                f"{self.peak:.1%} that they once did"
            )
        if share > self.peak:
            self.peak = share
        return {
            "uniform_collapse": _uniform(record, entropy_share),
            "information_lost": lost,
            "one_component_collapse": _one_component(record, entropy_share),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        return {"streaks": dict(self.streaks), "peak": self.peak}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what is missing stays as it is."""
        self.streaks.update(state.get("streaks", {}))
        self.peak = float(state.get("peak", self.peak))


def void_set_alarm(record: Mapping[str, float]) -> Alarm | None:
    """An alarm if most prototypes are copies of one that points away from the data.

    Args:
        record: with ``largest_duplicate_share`` and ``largest_duplicate_cosine`` of
            ``monitors.duplicate_statistics``.

    Example:
        >>> record = {"largest_duplicate_share": 0.83, "largest_duplicate_cosine": -1.0}
        >>> void_set_alarm(record).name
        'void_set'
        >>> void_set_alarm({"largest_duplicate_share": 0.83, "largest_duplicate_cosine": 0.2})
    """
    share, cosine = record["largest_duplicate_share"], record["largest_duplicate_cosine"]
    if share <= _VOID_SHARE or cosine >= _VOID_COSINE:
        return None
    return Alarm(
        "void_set",
        f"a void set is forming: {share:.0%} of the prototypes are copies of one that points away from "
        f"the data (cosine {cosine:.2f} with the mean of y). {_VOID_ADVICE}.",
    )
