"""The schema of ``method_kwargs``: names, types, defaults and what values are possible."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ConfigTypeError, ValidationError

from dinovmf_plugin.core.centering import CENTERINGS
from dinovmf_plugin.core.prototypes import NORMALIZATIONS

__all__ = [
    "DINOSettings",
    "MethodSettings",
    "check_choice",
    "check_range",
    "check_strategy",
    "check_vit",
    "read_settings",
]

SettingsT = TypeVar("SettingsT", bound="MethodSettings")


def check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the key unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(choices)}")


def check_range(key: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Raise a ValueError that names the key unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(
            f"{key}={value} must lie in [{low}, {high}]" + (f"; {hint}" if hint else "")
        )


def check_vit(cfg: DictConfig) -> None:
    """Raise a ValueError unless ``backbone.name`` is one of the host's plain Vision Transformers."""
    if not cfg.backbone.name.startswith("vit_"):
        raise ValueError(
            f"backbone.name={cfg.backbone.name!r} cannot train {cfg.method}, which masks or drops single "
            "patches: choose vit_tiny, vit_small, vit_base or vit_large"
        )


def check_strategy(cfg: DictConfig) -> None:
    """Raise a ValueError unless ``strategy`` keeps the whole network in every process.

    The teacher follows the student parameter by parameter, centre and prototypes are needed whole, and
    FSDP, DeepSpeed and the like cut parameters into pieces.
    """
    strategy = OmegaConf.select(cfg, "strategy", default="auto")
    if strategy is not None and not str(strategy).startswith(("auto", "ddp", "single_device")):
        raise ValueError(
            f"strategy={strategy!r} is not supported by {cfg.method}: the teacher's average, the centre and "
            "the prototypes need whole parameters in every process; set strategy=ddp (or auto)"
        )


@dataclass
class MethodSettings:
    """``method_kwargs`` that every method has."""

    # the two switches of the paper's Table 1
    normalization: str = "none"
    centering: str = "logit"
    # head
    proj_hidden_dim: int = 2048
    proj_output_dim: int = 256
    num_prototypes: int = 65536
    proj_num_layers: int = 3
    use_bn_in_head: bool = False
    normalizer_order: int = 0  # terms of log C_p(kappa) beyond the paper's: 0, 1 or 2
    # temperatures
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    # targets
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    # optimisation
    clip_grad: float = 0.0
    final_weight_decay: float | None = None  # cosine from optimizer.weight_decay; None: constant
    prototype_spread: float = 0.0  # weight of a loss that pushes prototypes apart
    # starting point
    init_from: str | None = (
        None  # checkpoint: this project's, or an official DINO, iBOT or MSN file
    )
    init_which: str = "teacher"  # of its two networks
    # monitors (training.monitor.MixtureMonitor)
    monitor: bool = True
    monitor_every: int = 50  # steps
    stop_on_collapse: bool = False

    def validate(self) -> None:
        """Raise a ValueError for the first value that cannot work, naming its key."""
        check_choice("method_kwargs.normalization", self.normalization, NORMALIZATIONS)
        check_choice("method_kwargs.centering", self.centering, CENTERINGS)
        check_choice("method_kwargs.init_which", self.init_which, ("teacher", "student"))
        for key in (
            "proj_hidden_dim",
            "proj_output_dim",
            "num_prototypes",
            "proj_num_layers",
            "sinkhorn_iterations",
            "monitor_every",
        ):
            check_range(f"method_kwargs.{key}", getattr(self, key), 1, float("inf"))
        for key in ("clip_grad", "prototype_spread"):
            check_range(f"method_kwargs.{key}", getattr(self, key), 0, float("inf"))
        if self.normalization == "vmf" and self.proj_output_dim < 3:
            raise ValueError(
                f"method_kwargs.proj_output_dim={self.proj_output_dim} is too small for "
                "normalization=vmf: at least 3 (the paper uses 256)"
            )
        check_range("method_kwargs.normalizer_order", self.normalizer_order, 0, 2)
        check_range("method_kwargs.center_momentum", self.center_momentum, 0, 1 - 1e-9, "DINO: 0.9")
        if self.final_weight_decay is not None:
            check_range("method_kwargs.final_weight_decay", self.final_weight_decay, 0, 100)
        check_temperatures(self.student_temperature, self.teacher_temperatures())

    def teacher_temperatures(self) -> dict[str, float]:
        """All temperatures of the teacher, by key."""
        return {"teacher_temperature": self.teacher_temperature}


@dataclass
class DINOSettings(MethodSettings):
    """``method_kwargs`` of ``dino_multicrop`` and ``dino_vmf``.

    Names that solo-learn's own DINO has are kept; the published values are in ``configs/method/``.
    """

    warmup_teacher_temperature: float = 0.04
    warmup_teacher_temperature_epochs: int = 0
    center_raw_scores: bool = False  # vmf with logit: leave log C_p(kappa) out of the centre
    freeze_last_layer: int = 1  # epochs
    decay_magnitudes: bool = True  # weight decay on prototype norms, as in DINO

    def validate(self) -> None:
        """Raise a ValueError for the first value that cannot work, naming its key."""
        super().validate()
        for key in ("warmup_teacher_temperature_epochs", "freeze_last_layer"):
            check_range(f"method_kwargs.{key}", getattr(self, key), 0, float("inf"))
        if self.center_raw_scores and (self.normalization, self.centering) != ("vmf", "logit"):
            raise ValueError(
                "method_kwargs.center_raw_scores=True has no meaning with "
                f"normalization={self.normalization}, centering={self.centering}: it leaves log C_p(kappa) "
                "out of the centre of normalization=vmf, centering=logit"
            )

    def teacher_temperatures(self) -> dict[str, float]:
        """All temperatures of the teacher, by key."""
        return {
            **super().teacher_temperatures(),
            "warmup_teacher_temperature": self.warmup_teacher_temperature,
        }


def check_temperatures(student: float, teachers: dict[str, float]) -> None:
    """Temperatures are positive and every teacher's is below the student's (DINO section 3.1)."""
    for key, value in {"student_temperature": student, **teachers}.items():
        if not value > 0:
            raise ValueError(f"method_kwargs.{key}={value} must be greater than 0")
    for key, value in teachers.items():
        if value >= student:
            raise ValueError(
                f"method_kwargs.{key}={value} must be lower than student_temperature={student}: a "
                "teacher that is not sharper than the student collapses to uniform outputs "
                "(DINO: teacher 0.04 to 0.07, student 0.1)"
            )


def read_settings(cls: type[SettingsT], method_kwargs: DictConfig) -> SettingsT:
    """Read ``method_kwargs`` into ``cls``, checking names, types and values.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right.

    Example:
        >>> read_settings(DINOSettings, OmegaConf.create({"normalisation": "vmf"}))
        Traceback (most recent call last):
        ...
        ValueError: method_kwargs.normalisation is no key of this method: did you mean normalization?
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for key in map(str, method_kwargs):
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(names)}"
            raise ValueError(f"method_kwargs.{key} is no key of this method: {hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), method_kwargs)
        settings = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigTypeError, ValidationError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"method_kwargs.{error.full_key}: {reason}") from error
    assert isinstance(settings, cls)
    settings.validate()
    return settings
