"""The base of every method here: student, teacher, one forward per resolution, the optimization."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinovmf_plugin.core import vit as backbones
from dinovmf_plugin.core.centering import Centering
from dinovmf_plugin.core.heads import ProjectionHead
from dinovmf_plugin.core.prototypes import Prototypes
from dinovmf_plugin.host import BaseMomentumMethod
from dinovmf_plugin.losses.koleo import koleo_loss
from dinovmf_plugin.methods.acceleration import (
    check_acceleration,
    compile_networks,
    use_grad_checkpointing,
    wants,
)
from dinovmf_plugin.methods.settings import (
    MethodSettings,
    check_backbone,
    check_batch,
    check_layer_rates,
    check_strategy,
)
from dinovmf_plugin.methods.solo_keys import read_solo_keys
from dinovmf_plugin.methods.steps import ScheduledSteps
from dinovmf_plugin.runs.settings import read
from dinovmf_plugin.training.late import LateNumber
from dinovmf_plugin.training.records import REMEDY, NonFiniteLossError, StepRecord
from dinovmf_plugin.training.stored_config import StoredConfig

__all__ = ["DistillationOutput", "NonFiniteLossError", "SelfDistillation"]


@dataclasses.dataclass(frozen=True)
class DistillationOutput:
    """What ``distillation_loss`` returns.

    Attributes:
        loss: scalar with gradient.
        student_features: the student's features of its global views ``(G * B, D)``, view-major.
        teacher_features: the teacher's ``(Q * B, D)``, view-major.
        scalars: further numbers to log.
    """

    loss: Tensor
    student_features: Tensor
    teacher_features: Tensor
    scalars: dict[str, float | Tensor]


_SPREAD_ANCHORS = 8192


class SelfDistillation(StoredConfig, ScheduledSteps):
    """Student and EMA teacher of one architecture on the host's base class.

    Subclasses define ``settings_class``, ``default_settings`` and ``distillation_loss``; everything that the
    methods share (multi-crop batching, online classifier and kNN, schedules per step, clipping after
    unscaling, the frozen last layer, the EMA, resuming) is here.

    Differs from upstream (solo-learn's base): crops of one size share one forward; the EMA coefficient is
    a function of the step, so that it survives a resume; validation looks at the teacher; labels are
    optional; a resumed run draws what an uninterrupted one would have drawn (``SeededSteps``); biases and
    other 1-d parameters are never decayed, whatever ``optimizer.exclude_bias_n_norm_wd`` says (DINO).
    """

    settings_class: ClassVar[type[MethodSettings]] = MethodSettings
    default_settings: ClassVar[dict[str, Any]] = {}
    centering: Centering
    head: ProjectionHead
    momentum_head: ProjectionHead

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.settings: Any = read(self.settings_class, self.cfg.method_kwargs, "method_kwargs.")
        self.last_step: StepRecord | None = None
        self._step_of_last_update = self._schedule_offset = 0
        self._pending_loss: LateNumber | None = None
        self.last_loss: float | None = None  # for the progress bar
        backbones.disable_drop_path(self.momentum_backbone)
        self.momentum_backbone.requires_grad_(False)
        if wants(self.cfg, "grad_checkpointing"):
            use_grad_checkpointing(self.backbone)

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Fill in the host's and the method's defaults; raise for what cannot work.

        Raises:
            ValueError: one sentence that names the key, the value and what would be right.
        """
        cfg = BaseMomentumMethod.add_and_assert_specific_cfg(cfg)
        given: Any = OmegaConf.to_container(cfg.method_kwargs, resolve=True) or {}
        own = str(cls.default_settings.get("normalization", cls.settings_class.normalization))
        given = read_solo_keys(given, cfg.method, own)
        settings = read(cls.settings_class, {**cls.default_settings, **given}, "method_kwargs.")
        cfg.method_kwargs = OmegaConf.create(dataclasses.asdict(settings))
        cls.check_config(cfg)
        return cfg

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Check what lies outside ``method_kwargs``."""
        check_backbone(cfg)
        check_strategy(cfg)
        check_acceleration(cfg)
        check_layer_rates(cfg)
        check_batch(cfg)
        if cfg.scheduler.name not in ("warmup_cosine", "none"):
            raise ValueError(
                f"scheduler.name={cfg.scheduler.name!r} is not supported by {cfg.method}: "
                "choose warmup_cosine or none"
            )
        if cfg.scheduler.interval != "step":
            raise ValueError(
                f"scheduler.interval={cfg.scheduler.interval!r} is not supported by {cfg.method}, whose "
                "schedules are functions of the step: set scheduler.interval=step"
            )
        if cfg.optimizer.name not in cls._OPTIMIZERS:
            raise ValueError(
                f"optimizer.name={cfg.optimizer.name!r} is unknown: choose one of "
                f"{', '.join(cls._OPTIMIZERS)}"
            )
        if cfg.data.num_large_crops + cfg.data.num_small_crops < 2:
            raise ValueError(
                f"augmentations give one crop per image, but {cfg.method} compares views of it: at least "
                "two are needed"
            )
        for key, value, low, high in (
            ("momentum.base_tau", cfg.momentum.base_tau, 0, 1),
            ("momentum.final_tau", cfg.momentum.final_tau, cfg.momentum.base_tau, 1),
            ("scheduler.warmup_epochs", cfg.scheduler.warmup_epochs, 0, cfg.max_epochs),
        ):
            if not low <= value <= high:
                raise ValueError(f"{key}={value} must lie in [{low}, {high}]")
        if cfg.momentum.classifier:
            raise ValueError(
                "momentum.classifier=True is not supported: the online classifier follows the student "
                "and kNN the teacher; evaluate the teacher with main_linear instead"
            )

    # ---- networks -------------------------------------------------------------------------------

    def initialize_teacher(self) -> None:
        """Copy the student's head into the teacher's, which then has no gradient."""
        self.momentum_head.load_state_dict(self.head.state_dict())
        self.momentum_head.requires_grad_(False)

    @property
    def student_prototypes(self) -> Prototypes:
        """The prototypes that the student trains."""
        return self.head.last_layer  # type: ignore[return-value]

    @property
    def spread_prototypes(self) -> list[Prototypes]:
        """All prototypes of the student, each set to be spread on its own."""
        return [self.student_prototypes]

    @property
    def projection_heads(self) -> list[ProjectionHead]:
        """Every head of student and teacher."""
        return [self.head, self.momentum_head]

    def projection(self) -> nn.Module:
        """The student's head as checkpoints name its parts: ``mlp`` and ``last_layer``."""
        return self.head

    def initialize_from_checkpoint(self) -> None:
        """Start from imported weights (``method_kwargs.init_from``), student and teacher alike."""
        if self.settings.init_from is None:
            return
        from dinovmf_plugin.checkpoints import initialize_from

        file, which = self.settings.init_from, self.settings.init_which
        try:
            token = getattr(self, "mask_token", None)  # of methods that mask patches
            report = initialize_from(self.backbone, self.projection(), file, which, token)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"method_kwargs.init_from={file}: {error}") from error
        rank_zero_info(f"method_kwargs.init_from: {report}")
        self.momentum_backbone.load_state_dict(self.backbone.state_dict())
        self.initialize_teacher()

    # ---- training -------------------------------------------------------------------------------

    def teacher_temperature(self) -> float:
        """The teacher's temperature in the current epoch."""
        return self.settings.teacher_temperature

    def distillation_loss(self, crops: list[Tensor]) -> DistillationOutput:
        """The method's loss on one batch of crops, and what the online probes need."""
        raise TypeError(f"{type(self).__name__} does not define distillation_loss")

    def prototype_spread_loss(self) -> Tensor | float:
        """KoLeo-proto of arXiv 2410.14060 ("(kp)"), times ``method_kwargs.prototype_spread``."""
        weight = self.settings.prototype_spread
        if not weight:
            return 0.0
        total: Tensor | float = 0.0
        for prototypes in self.spread_prototypes:
            # the search of all neighbors is quadratic: of 65536 prototypes take a subset every step
            anchors = min(prototypes.num_prototypes, _SPREAD_ANCHORS)
            total = total + weight * koleo_loss(
                prototypes.directions(), num_anchors=anchors, generator=self.step_generator()
            )
        return total

    def feature_spread_loss(self, features: Tensor, images: int) -> Tensor | float:
        """KoLeo on the student's features, times ``method_kwargs.koleo_weight`` (DINOv2).

        The sum over the global crops: two crops of one image are not to be pushed apart. Neighbors are
        searched among the images of this process, as in the official code.

        Args:
            features: of the global crops ``(G * images, D)``, view-major.
            images: of the batch.
        """
        weight = self.settings.koleo_weight
        if not weight:
            return 0.0
        loss = torch.stack([koleo_loss(view) for view in features.split(images)]).sum()
        self.log("train_koleo_loss", loss.detach())
        return weight * loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: ``batch`` is ``[indexes, [crops], targets]`` as the host's loaders give it.

        Raises:
            ValueError: if the loader gives another number of crops than the config says.
        """
        _, crops, targets = batch
        crops = [crops] if isinstance(crops, Tensor) else list(crops)
        if len(crops) != self.num_crops:
            raise ValueError(
                f"the loader gave {len(crops)} crops per image, but augmentations describe "
                f"{self.num_crops}"
            )
        out = self.distillation_loss(crops)
        self._pending_loss = LateNumber(out.loss)
        self.log(
            "train_loss",
            out.loss.detach(),
            on_step=True,
            on_epoch=True,
            sync_dist=True,
        )
        scalars = {
            "teacher_temperature": self.teacher_temperature(),
            "student_temperature": self.settings.student_temperature,
            **out.scalars,
        }
        self.log_dict({name: self.on_device(value) for name, value in scalars.items()})
        self.update_knn_bank(out.teacher_features, targets)
        loss = out.loss + self.prototype_spread_loss()
        loss = loss + self.feature_spread_loss(out.student_features, len(crops[0]))
        return loss + self.online_classifier_loss(out.student_features, targets)

    def on_after_backward(self) -> None:
        """Refuse a loss that is not finite: before the optimizer's step, while a GPU is still busy.

        Raises:
            NonFiniteLossError: if the loss is NaN or infinite.
        """
        super().on_after_backward()
        pending, self._pending_loss = self._pending_loss, None
        if pending is None:
            return
        self.last_loss = pending.read()
        if not math.isfinite(self.last_loss):
            raise NonFiniteLossError(f"the loss became {self.last_loss} {self.where()} {REMEDY}")

    def where(self) -> str:
        """Step and epoch, for messages."""
        return f"at step {self.trainer.global_step} (epoch {self.current_epoch});"

    def on_fit_start(self) -> None:
        """Compile the networks, if ``performance.compile`` says so."""
        super().on_fit_start()
        if wants(self.cfg, "compile"):
            heads = [head.mlp for head in self.projection_heads]
            compile_networks(self.backbone, self.momentum_backbone, *heads)

    # ---- checkpoints ----------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Any]:
        """The plugin's own checkpointer (in place of the host's) and monitor."""
        from dinovmf_plugin.training.callbacks import method_callbacks

        return method_callbacks(self.cfg, self.settings)
