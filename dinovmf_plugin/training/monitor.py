"""One Lightning callback that watches the mixture while it trains."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dinovmf_plugin.core import distributed
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.mixture import statistics as monitors
from dinovmf_plugin.training.alarms import Alarm, CollapseWarning, CollapseWatch, void_set_alarm
from dinovmf_plugin.training.records import StepRecord

__all__ = ["MixtureMonitor"]

_ROWS = 64
_FEWEST_ROWS = 16
_TARGET_VALUES = 2**20  # K times the targets of a step that information is measured on


class MixtureMonitor(Callback):
    """Logs what tells a healthy mixture from a collapsing one, and says what to change.

    Reads ``pl_module.last_step`` (a ``StepRecord``), the prototypes of student and teacher
    (``head.last_layer`` and ``momentum_head.last_layer``, or one set ``prototypes``, as MSN has) and
    ``centering.center`` where there is one. Changes nothing of the training, draws no random numbers,
    and averages over ranks, so that every rank comes to the same conclusion.

    Every step costs one arg-max over the targets, and the sum and entropies of 16 to 64 of them;
    every ``every_n_steps`` steps student logits of up to 64 images; every epoch a greedy cover of up to
    4096 prototypes. Under ``monitor/`` are logged

    * per record, over 16 to 64 targets (fewer where K is large) of every step since the last record, of
      all ranks together:
      ``target_information`` and ``student_information`` (nats), both as ``..._share`` of log K, and
      ``information_rows``;
    * per record, of its own step: ``loss_over_log_k``, ``teacher_entropy``, ``student_entropy``, ``kl``,
      ``top1_agreement`` (one view of each image, DINO's pair of different views where there are two
      targets), ``batch_perplexity``, ``batch_largest_win_share``, ``center_min``, ``center_max``;
    * per epoch: ``win_share``, ``usage_perplexity``, ``largest_win_share``, ``usage_rows``,
      ``unique_prototypes``, ``examined_prototypes``, ``largest_duplicate_share``,
      ``largest_duplicate_cosine``, ``data_cosine_*``, ``resultant_length``, quantiles ``kappa_*``
      and ``magnitude_*``, ``negative_g``.

    Args:
        every_n_steps: optimizer steps between records.
        history_path: file to append every record and alarm to, one JSON object a line (a value that is
            not finite is null); None for no file. Written by rank 0; a relative path starts at the
            run's folder (``pl_module.run_folder``).
        stop_on_collapse: whether a collapse (uniform, to one component, or most of the information lost)
            ends the training.
        stop_on_void_set: whether a forming void set ends it; plain DINO trains on with one.
        patience: records in a row that must show a collapse.
        warmup_epochs: of the learning rate; until then little information is no collapse.

    Raises:
        ValueError: if ``every_n_steps`` or ``patience`` is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        history_path: str | Path | None = None,
        stop_on_collapse: bool = False,
        stop_on_void_set: bool = False,
        patience: int = 10,
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name}={value} of MixtureMonitor must be at least 1")
        self.every_n_steps = every_n_steps
        self.history_path = None if history_path is None else Path(history_path)
        self.stops = {
            "uniform_collapse": stop_on_collapse,
            "one_component_collapse": stop_on_collapse,
            "information_lost": stop_on_collapse,
            "void_set": stop_on_void_set,
        }
        self.patience = patience
        self.warmup_epochs = warmup_epochs
        self.watch: CollapseWatch | None = None
        self._watched: dict[str, Any] = {}
        self._recorded_step = -1
        self._information: Tensor | None = None
        self._wins: Tensor | None = None
        self._embedding_sum: Tensor | None = None
        self._void_reported = False

    # ---- hooks ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the prototypes, and open the history before any long work."""
        _, teacher = find_prototypes(pl_module)
        self.watch = CollapseWatch(teacher.num_prototypes, self.patience)
        self.watch.load_state_dict(self._watched)
        if self._information is not None and not trainer.is_global_zero:
            self._information = None  # the sum over the ranks, which the first one goes on with
        if self.history_path is not None and trainer.is_global_zero:
            self.history_path = Path(getattr(pl_module, "run_folder", ".")) / self.history_path
            self.history_path.parent.mkdir(parents=True, exist_ok=True)
            self._write("start", trainer, {"num_prototypes": teacher.num_prototypes})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Usage is counted per epoch."""
        self._wins = self._embedding_sum = None

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count winners; every ``every_n_steps`` optimizer steps, make a record."""
        step: StepRecord | None = getattr(pl_module, "last_step", None)
        if step is None:
            return
        batch_wins = self._count(step)
        self._inform(step)
        due = trainer.global_step % self.every_n_steps == 0
        if not due or trainer.global_step == self._recorded_step:
            return
        self._recorded_step = trainer.global_step
        record = average_over_ranks(step_record(pl_module, step, batch_wins))
        if self._information is not None:
            sums = distributed_sum(self._information)
            record |= to_floats(monitors.information_statistics(sums))
            self._information = None
        log_k = self._watch().log_k
        shown = {"loss_over_log_k": record["loss"] / log_k if log_k else math.nan, **record}
        pl_module.log_dict(
            {f"monitor/{k}": v for k, v in shown.items() if k != "loss"},
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )
        self._write("step", trainer, shown)
        warm = not self.warmup_epochs or self._progress(trainer, batch_idx) > self.warmup_epochs
        for alarm in self._watch().update(shown, warm=warm):
            self._raise(alarm, trainer)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Usage of the epoch, copies among the prototypes, concentrations."""
        step: StepRecord | None = getattr(pl_module, "last_step", None)
        if step is None or self._embedding_sum is None:
            return
        _, teacher = find_prototypes(pl_module)
        record: dict[str, float] = {}
        if self._wins is not None:
            wins = distributed_sum(self._wins).cpu()
            record["usage_rows"] = float(wins.sum())
            record |= {k: float(v) for k, v in monitors.usage_statistics(wins).items()}
        mean = distributed_sum(self._embedding_sum)  # its direction is all that counts
        directions = teacher.directions()
        record |= monitors.duplicate_statistics(directions, mean)
        record |= monitors.drift_statistics(directions, mean)
        record |= to_floats(monitors.prototype_statistics(teacher, step.teacher_temperature))
        pl_module.log_dict(
            {f"monitor/{k}": v for k, v in record.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=1,
        )
        self._write("epoch", trainer, record)
        alarm = void_set_alarm(record)
        if alarm is not None and not self._void_reported:
            self._raise(alarm, trainer)
        self._void_reported = alarm is not None

    def state_dict(self) -> dict[str, Any]:
        """Streaks, peak and the rows since the last record, so that a resumed run goes on exactly.

        All ranks must call it together, as Lightning does when it saves a checkpoint.
        """
        sums = self._information
        return {
            "watch": self.watch.state_dict() if self.watch else self._watched,
            "void_reported": self._void_reported,
            "recorded_step": self._recorded_step,
            "information": None if sums is None else distributed_sum(sums).cpu(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; a checkpoint of an earlier version holds streaks alone."""
        self._watched = state_dict.get("watch") or {"streaks": state_dict.get("streaks", {})}
        self._void_reported = bool(state_dict["void_reported"])
        self._recorded_step = state_dict.get("recorded_step", -1)
        self._information = state_dict.get("information")
        if self.watch is not None:
            self.watch.load_state_dict(self._watched)

    # ---- parts ----------------------------------------------------------------------------------

    def _watch(self) -> CollapseWatch:
        if self.watch is None:
            raise RuntimeError("MixtureMonitor was used outside Trainer.fit")
        return self.watch

    def _count(self, step: StepRecord) -> Tensor | None:
        """Add the step's winners and embeddings to the epoch's; return the step's winners."""
        total = step.teacher_embeddings.float().sum(dim=0)
        self._embedding_sum = total if self._embedding_sum is None else self._embedding_sum + total
        if step.targets is None:
            return None
        winners = monitors.winners(step.targets)
        wins = torch.zeros(step.targets.shape[-1], dtype=torch.int64, device=winners.device)
        wins.scatter_add_(0, winners, torch.ones_like(winners))
        self._wins = wins if self._wins is None else self._wins + wins
        return wins

    def _progress(self, trainer: Trainer, batch_idx: int) -> float:
        """Epochs trained; whole ones where the length of an epoch is not known (infinite)."""
        return trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches

    def _inform(self, step: StepRecord) -> None:
        """Add the step's targets to the sums since the last record."""
        if step.targets is None:
            return
        rows = min(_ROWS, max(_FEWEST_ROWS, _TARGET_VALUES // step.targets.shape[-1]))
        sums = monitors.information_sums(step.targets[:rows], step.loss)
        earlier = self._information
        self._information = sums if earlier is None else earlier.to(sums.device) + sums

    def _raise(self, alarm: Alarm, trainer: Trainer) -> None:
        self._write("alarm", trainer, {"name": alarm.name, "message": alarm.message})
        stop = self.stops[alarm.name]
        if trainer.is_global_zero:
            end = " Training stops here." if stop else ""
            warnings.warn(
                f"step {trainer.global_step}: {alarm.message}{end}", CollapseWarning, stacklevel=2
            )
        if stop:
            trainer.should_stop = True

    def _write(self, kind: str, trainer: Trainer, record: dict[str, Any]) -> None:
        if self.history_path is None or not trainer.is_global_zero:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = {"kind": kind, "epoch": trainer.current_epoch, "step": trainer.global_step, **finite}
        with open(self.history_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def find_prototypes(pl_module: Any) -> tuple[Prototypes, Prototypes]:
    """The student's and the teacher's prototypes of a method; the same object in MSN.

    Raises:
        TypeError: if the module has neither.
    """
    shared = getattr(pl_module, "prototypes", None)
    if shared is not None:
        return shared, shared
    student = getattr(getattr(pl_module, "head", None), "last_layer", None)
    teacher = getattr(getattr(pl_module, "momentum_head", None), "last_layer", None)
    if student is None or teacher is None:
        raise TypeError(
            f"{type(pl_module).__name__} has neither prototypes nor head.last_layer and "
            "momentum_head.last_layer: MixtureMonitor watches methods of dinovmf_plugin"
        )
    return student, teacher


def step_record(pl_module: Any, step: StepRecord, wins: Tensor | None) -> dict[str, Tensor]:
    """Scalar tensors of one training step on this rank."""
    student, _ = find_prototypes(pl_module)
    record = {"loss": step.loss.float()}
    if step.targets is not None and wins is not None:
        images = step.student_embeddings.shape[1]
        rows = min(images, _ROWS)
        # with two targets the pair of *different* views, as in the loss; with one, its only partner
        view = 1 if len(step.targets) > images and len(step.student_embeddings) > 1 else 0
        logits = student(step.student_embeddings[view, :rows], step.student_temperature)
        record |= monitors.distillation_statistics(step.targets[:rows], logits)
        mean = step.targets[:rows].float().mean(dim=0)
        record["batch_perplexity"] = monitors.entropy(mean).exp()
        record["batch_largest_win_share"] = wins.max() / wins.sum()
    center = getattr(getattr(pl_module, "centering", None), "center", None)
    if center is not None:
        record["center_min"], record["center_max"] = center.float().aminmax()
    return record


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all of them."""
    stacked = torch.stack([value.float().reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def average_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Means over the ranks, so that all of them see the same collapse."""
    stacked = torch.stack([value.float().reshape(()) for value in values.values()])
    stacked = distributed_sum(stacked) / distributed.world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def distributed_sum(value: Tensor) -> Tensor:
    """Sum over the ranks; the argument stays as it is."""
    if not distributed.is_distributed():
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
