"""What happens around an optimizer step: groups, schedules by epoch and fraction, clipping, EMA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dinovmf_plugin.core import schedules
from dinovmf_plugin.methods.probes import OnlineProbes
from dinovmf_plugin.methods.settings import MethodSettings
from dinovmf_plugin.training import layer_rates, optimization, resuming
from dinovmf_plugin.training.config import count_devices
from dinovmf_plugin.training.seeding import SeededSteps

__all__ = ["ScheduledSteps"]


class ScheduledSteps(SeededSteps, OnlineProbes):
    """The optimizer and its schedules, as functions of training's progress; the teacher follows each step."""

    settings: MethodSettings
    _schedule_offset: int
    _step_of_last_update: int

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student, teacher) modules that the EMA follows."""
        return [*super().momentum_pairs, (self.head, self.momentum_head)]

    def on_device(self, number: float | Tensor) -> Tensor:
        """A number to log: made on the device, since copying one there waits for a GPU."""
        return number if isinstance(number, Tensor) else torch.full((), number, device=self.device)

    def named_parameter_groups(self) -> dict[str, Any]:
        """Group name -> named parameters that the optimizer gets."""
        return {
            "backbone": self.backbone.named_parameters(),
            "head": self.head.named_parameters(),
            "classifier": self.classifier.named_parameters(),
        }

    def group_options(self) -> dict[str, dict[str, Any]]:
        """Group name -> what it has of its own (see ``optimization.split_weight_decay``)."""
        return {"classifier": {"lr": self.classifier_lr, "decay": False}}

    def own_group(self, group: str, name: str) -> tuple[str, dict[str, Any]]:
        """Where a group is split further: by the layers of a ViT, if their rates differ."""
        s = self.settings
        if s.layer_decay == 1 and s.patch_embed_lr_mult == 1:
            return "", {}
        network: Any = self.backbone
        depth = len(network.blocks)
        if group == "mask_token":  # stands among the patch embeddings
            return "", {"lr_scale": layer_rates.layer_rate("cls_token", depth, s.layer_decay)}
        if group != "backbone":
            return "", {}
        layer = layer_rates.layer_of(name, depth)
        part = "_patch_embed" if name.startswith("patch_embed.") else f"_layer{layer}"
        scale = layer_rates.layer_rate(name, depth, s.layer_decay, s.patch_embed_lr_mult)
        return part, {"lr_scale": scale}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, split by weight decay and, where rates differ, by layer."""
        return optimization.split_weight_decay(
            self.named_parameter_groups(), self.group_options(), divide=self.own_group
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after its warm-up, by the rule of ``method_kwargs.lr_scaling``."""
        cfg, scaling = self.cfg, self.settings.lr_scaling
        if scaling == "linear":  # as the host has done
            return float(self.lr)
        processes = count_devices(cfg.devices, cfg.get("accelerator", "auto")) * cfg.num_nodes
        return layer_rates.rate_for_batch(self.lr, cfg.optimizer.batch_size * processes, scaling)

    @property
    def holds_last_layer(self) -> bool:
        """Whether the last layers' learning rate is 0 in this epoch."""
        return False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The host's optimizer; schedules are set every step."""
        peak, groups = self.peak_lr, self.parameter_groups()
        for group in groups:
            group["peak_lr"] = group.get("lr", peak)
        optimizer = optimization.make_optimizer(
            self._OPTIMIZERS[self.cfg.optimizer.name],
            groups,
            lr=peak,
            weight_decay=self.weight_decay,
            **self.extra_optimizer_args,
        )
        return resuming.keep_configured_values(optimizer)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def schedule_steps(self) -> int:
        """Length of the schedules of learning rate, weight decay and EMA, in optimizer steps."""
        return self.total_steps

    def schedule_step(self, step: int) -> int:
        """Where the schedules stand at optimizer step ``step`` of this epoch (counted from 0 over the run).

        Epoch times steps per epoch, as in the official code, not the number of steps done: a run that goes on
        with another batch size, or left an epoch early, stays at its epoch's part of the schedules.
        """
        return step + self._schedule_offset

    def _find_schedule_offset(self, batch_idx: int) -> int:
        batches = self.trainer.num_training_batches
        if not math.isfinite(batches):  # a loader without a length
            return 0
        accumulated = self.trainer.accumulate_grad_batches
        position = self.current_epoch * math.ceil(batches / accumulated) + batch_idx // accumulated
        return int(position - self.trainer.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set learning rate and weight decay of the coming optimizer step, and seed drop path."""
        self.seed_batch(batch_idx)
        self._schedule_offset = self._find_schedule_offset(batch_idx)
        final = self.settings.final_weight_decay
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimization.update_schedules(
            optimizer,
            self.schedule_step(self.trainer.global_step),
            self.schedule_steps,
            min_lr=self.min_lr,
            warmup_steps=round(self.warmup_epochs * self.total_steps / self.max_epochs),
            warmup_start_lr=self.warmup_start_lr,
            weight_decay=self.weight_decay,
            final_weight_decay=self.weight_decay if final is None else final,
            constant_lr=self.cfg.scheduler.name == "none",
            hold_last_layer=self.holds_last_layer,
        )
        decayed = optimizer.param_groups[0]  # of the backbone
        rate = decayed["lr"] / decayed.get("lr_scale", 1.0)
        self.log_dict({"lr": rate, "weight_decay": decayed["weight_decay"]})

    def adjust_gradients(self) -> None:
        """The method's own clipping and freezing, on complete and unscaled gradients."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer is told, then as the method is (``adjust_gradients``).

        Lightning calls this after AMP has unscaled the gradients and after gradient accumulation;
        clipping in ``on_after_backward``, as the host does, would clip scaled gradients.
        """
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.adjust_gradients()

    def on_train_start(self) -> None:
        """Remember where a resumed run stands, so that the first micro-batch does not move the teacher."""
        self._step_of_last_update = self.trainer.global_step

    def teacher_momentum(self, step: int) -> float:
        """EMA coefficient after optimizer step ``step`` (counted from 0)."""
        momentum, step = self.cfg.momentum, self.schedule_step(step)
        return schedules.cosine(step, self.schedule_steps, momentum.base_tau, momentum.final_tau)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher, once per optimizer step (not per micro-batch)."""
        step = self.trainer.global_step
        if step == self._step_of_last_update:
            return
        self._step_of_last_update = step
        momentum = self.teacher_momentum(step - 1)
        optimization.update_teacher(self.momentum_pairs, momentum)
        self.log("tau", self.on_device(momentum))
