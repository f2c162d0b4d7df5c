"""When a training's records mean collapse, and what to change then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Alarm", "CollapseWarning", "CollapseWatch", "void_set_alarm"]

_LOSS_MARGIN = 1e-2
_ENTROPY_MARGIN = 5e-2
_ONE_COMPONENT = 0.95
_VOID_SHARE = 0.5
_VOID_COSINE = -0.9

_UNIFORM_ADVICE = (
    "Lower the teacher temperature (method_kwargs.teacher_temperature and "
    "warmup_teacher_temperature, down to 0.02) or warm it up over more epochs "
    "(warmup_teacher_temperature_epochs), lower optimizer.lr or lengthen scheduler.warmup_epochs, and for "
    "small batches raise momentum.base_tau (0.9995)"
)
_ONE_COMPONENT_ADVICE = (
    "Raise the teacher temperature (method_kwargs.teacher_temperature), let the centre follow faster "
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
        name: ``uniform_collapse``, ``one_component_collapse`` or ``void_set``.
        message: what was seen and what to change.
    """

    name: str
    message: str


def _uniform(record: Mapping[str, float], log_k: float) -> str | None:
    loss, student = record.get("loss", math.nan), record.get("student_entropy", math.nan)
    teacher = record.get("teacher_entropy", math.nan)
    # A loss of log K alone can be chance; only a uniform student is pinned there by any target.
    if abs(loss - log_k) < _LOSS_MARGIN and student > log_k - _ENTROPY_MARGIN:
        return f"the loss is {loss:.3f} = log K ({log_k:.3f}): the student's output is uniform"
    if teacher > log_k - _ENTROPY_MARGIN:
        return f"the teacher's entropy is {teacher:.3f} of at most log K = {log_k:.3f}"
    return None


def _one_component(record: Mapping[str, float], log_k: float) -> str | None:
    share = record.get("batch_largest_win_share", math.nan)
    teacher = record.get("teacher_entropy", 0.0)
    # the arg-max of uniform targets is always the first prototype: that is the other collapse
    if share > _ONE_COMPONENT and teacher <= log_k - _ENTROPY_MARGIN:
        return f"one prototype is the target of {share:.0%} of the images"
    return None


_SIGNS = {
    "uniform_collapse": (_uniform, _UNIFORM_ADVICE),
    "one_component_collapse": (_one_component, _ONE_COMPONENT_ADVICE),
}


class CollapseWatch:
    """Counts how many records in a row show a collapse, and speaks up once per collapse.

    Args:
        num_prototypes: ``K``.
        patience: records in a row before an alarm.

    Example:
        >>> watch = CollapseWatch(num_prototypes=4, patience=2)
        >>> record = {"teacher_entropy": math.log(4)}
        >>> [alarm.name for _ in range(4) for alarm in watch.update(record)]
        ['uniform_collapse']
    """

    def __init__(self, num_prototypes: int, patience: int = 10) -> None:
        self.log_k = math.log(num_prototypes)
        self.patience = patience
        self.streaks = dict.fromkeys(_SIGNS, 0)

    def update(self, record: Mapping[str, float]) -> list[Alarm]:
        """Take in one record (``teacher_entropy, student_entropy, loss, batch_largest_win_share``).

        Values that are missing or NaN are signs of nothing.

        Returns:
            The alarms that this record sets off.
        """
        alarms = []
        for name, (sign, advice) in _SIGNS.items():
            seen = sign(record, self.log_k)
            self.streaks[name] = self.streaks[name] + 1 if seen else 0
            if self.streaks[name] == self.patience:
                title = name.replace("_", " ")
                message = f"{title}, {self.patience} records in a row: {seen}. {advice}."
                alarms.append(Alarm(name, message))
        return alarms


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
