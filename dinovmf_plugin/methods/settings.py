"""The keys of ``method_kwargs``: types, bounds and defaults; and what a method asks of a whole recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.checkpoints.named import check_named_kwargs
from dinovmf_plugin.checkpoints.vit_arguments import check_vit_kwargs
from dinovmf_plugin.core.centering import CenteringName
from dinovmf_plugin.core.prototypes import Normalization
from dinovmf_plugin.runs.bounds import Count, Fraction, Path, Positive, Share, Weight, Whole
from dinovmf_plugin.runs.settings import Doc, Settings
from dinovmf_plugin.training.layer_rates import LRScaling

__all__ = [
    "DINOSettings",
    "MethodSettings",
    "check_backbone",
    "check_batch",
    "check_layer_rates",
    "check_maskable",
    "check_strategy",
    "check_vit",
]

Normalizing = Annotated[
    Normalization, Doc("of the prototypes: free norms, norms 1, or a vMF mixture (Table 1)")
]
Centering = Annotated[CenteringName, Doc("of the teacher: Eq. 8, Eq. 9 or Sinkhorn (Table 1)")]
PrototypeCount = Annotated[Count, Doc("K, mixture components")]
BatchNorm = Annotated[bool, Doc("BatchNorm in the head")]
TeacherTemperature = Annotated[Positive, Doc("of the teacher, below the student's")]
ClipGrad = Annotated[Weight, Doc("largest norm of a parameter's gradient; 0: no clipping")]
CenterMomentum = Annotated[Share, Doc("of the moving average (DINO, iBOT: 0.9)")]


def check_vit(cfg: DictConfig) -> None:
    """Raise a ValueError unless ``backbone.name`` is one of the host's plain Vision Transformers."""
    if not cfg.backbone.name.startswith("vit_"):
        raise ValueError(
            f"backbone.name={cfg.backbone.name!r} cannot train {cfg.method}, which masks or drops single "
            "patches: choose vit_tiny, vit_small, vit_base or vit_large"
        )


def check_backbone(cfg: DictConfig) -> None:
    """Refuse a network whose features no evaluation could load, and crops that are too small for it.

    Raises:
        ValueError: one sentence that names the key, the value and what would be right.
    """
    given = OmegaConf.select(cfg, "backbone.kwargs")
    kwargs: Any = (OmegaConf.to_container(given, resolve=True) if given is not None else None) or {}
    if kwargs.get("in_chans", 3) != 3:
        raise ValueError(
            f"backbone.kwargs.in_chans={kwargs['in_chans']!r} is not supported: images are RGB, 3 channels"
        )
    if not cfg.backbone.name.startswith("vit_"):
        check_named_kwargs(cfg.backbone.name, kwargs)
        return
    check_vit_kwargs(kwargs)
    for size in crop_sizes(cfg):
        if size < _patch_size(kwargs):
            raise ValueError(
                f"augmentations: crop_size={size} is smaller than one patch "
                f"(backbone.kwargs.patch_size={kwargs.get('patch_size')})"
            )


def check_maskable(cfg: DictConfig) -> None:
    """Refuse large crops of one patch, of which nothing can be masked."""
    kwargs = OmegaConf.select(cfg, "backbone.kwargs") or {}
    patch = _patch_size(kwargs)
    for size in crop_sizes(cfg)[:1]:
        if size // patch < 2:
            raise ValueError(
                f"augmentations: crop_size={size} is a grid of 1 x 1 patches (backbone.kwargs.patch_size="
                f"{kwargs.get('patch_size')}), of which {cfg.method} can mask none: at least 2 x 2 are needed"
            )


def check_layer_rates(cfg: DictConfig) -> None:
    """Refuse learning rates by layer for networks that have no blocks in a row."""
    for key in ("layer_decay", "patch_embed_lr_mult"):
        value = cfg.method_kwargs[key]
        if value != 1 and not cfg.backbone.name.startswith("vit_"):
            raise ValueError(
                f"method_kwargs.{key}={value} needs a Vision Transformer, but backbone.name is "
                f"{cfg.backbone.name}: set it to 1, or choose vit_tiny, vit_small, vit_base or vit_large"
            )


def check_batch(cfg: DictConfig) -> None:
    """Refuse single images where each needs a neighbor."""
    weight = cfg.method_kwargs.koleo_weight
    if weight and cfg.optimizer.batch_size == 1:
        raise ValueError(
            f"optimizer.batch_size=1 is too small for method_kwargs.koleo_weight={weight}: KoLeo needs at "
            "least 2 images a process"
        )


def crop_sizes(cfg: DictConfig) -> list[int]:
    """Sides of the crops in pixels, the large ones' first; empty without ``augmentations``."""
    return list(dict.fromkeys(int(crop.crop_size) for crop in cfg.get("augmentations") or []))


def _patch_size(kwargs: Any) -> int:
    patch = kwargs.get("patch_size") or 16
    return int(patch) if isinstance(patch, int) else max(map(int, patch))


def check_strategy(cfg: DictConfig) -> None:
    """Raise a ValueError unless ``strategy`` keeps the whole network in every process.

    The teacher follows the student parameter by parameter, center and prototypes are needed whole, and
    FSDP, DeepSpeed and the like cut parameters into pieces.
    """
    strategy = OmegaConf.select(cfg, "strategy", default="auto")
    if strategy is not None and not str(strategy).startswith(("auto", "ddp", "single_device")):
        raise ValueError(
            f"strategy={strategy!r} is not supported by {cfg.method}: the teacher's average, the center and "
            "the prototypes need whole parameters in every process; set strategy=ddp (or auto)"
        )


@dataclass(frozen=True)
class MethodSettings(Settings):
    """``method_kwargs`` that every method has."""

    normalization: Normalizing = "none"
    centering: Centering = "logit"
    # head
    proj_hidden_dim: Annotated[Count, Doc("width of the head's hidden layers")] = 2048
    proj_output_dim: Annotated[Count, Doc("p, dimension of the unit vectors")] = 256
    num_prototypes: PrototypeCount = 65536
    proj_num_layers: Annotated[Count, Doc("layers of the head before the prototypes")] = 3
    use_bn_in_head: BatchNorm = False
    normalizer_order: Annotated[
        int, Ge(0), Le(2), Doc("terms of log C_p(kappa) beyond the paper's")
    ] = 0
    # temperatures
    student_temperature: Annotated[Positive, Doc("of the student")] = 0.1
    teacher_temperature: TeacherTemperature = 0.07
    # targets
    center_momentum: CenterMomentum = 0.9
    sinkhorn_iterations: Annotated[Count, Doc("of centering=sinkhorn")] = 3
    # optimization
    clip_grad: ClipGrad = 0.0
    final_weight_decay: Annotated[
        Annotated[float, Ge(0), Le(100)] | None,
        Doc("end of a cosine from optimizer.weight_decay; null: constant"),
    ] = None
    prototype_spread: Annotated[
        Weight, Doc("weight of KoLeo-proto (arXiv 2410.14060), which pushes prototypes apart")
    ] = 0.0
    # DINOv2's (docs/training.md)
    koleo_weight: Annotated[
        Weight, Doc("weight of KoLeo on the student's features of each global crop (DINOv2: 0.1)")
    ] = 0.0
    layer_decay: Annotated[
        Fraction, Doc("learning rate of a ViT's layer over that of the next one (DINOv2: 0.9)")
    ] = 1.0
    patch_embed_lr_mult: Annotated[
        Fraction, Doc("further factor of the patch embedding's learning rate (DINOv2: 0.2)")
    ] = 1.0
    lr_scaling: Annotated[
        LRScaling,
        Doc("optimizer.lr times batch / 256, or times the root of batch / 1024 (sqrt, DINOv2)"),
    ] = "linear"
    # starting point
    init_from: Annotated[
        Path | None,
        Doc("checkpoint to start from: this project's, or an official DINO, iBOT or MSN file"),
    ] = None
    init_which: Annotated[Literal["teacher", "student"], Doc("of its two networks")] = "teacher"
    # monitors
    monitor: Annotated[bool, Doc("write the mixture's statistics while training")] = True
    monitor_every: Annotated[Count, Doc("steps between two of them")] = 50
    stop_on_collapse: Annotated[bool, Doc("stop a run that has collapsed, not only warn")] = False

    def check(self) -> None:
        """vMF needs three dimensions, and every teacher is sharper than the student."""
        if self.normalization == "vmf" and self.proj_output_dim < 3:
            raise ValueError(
                f"proj_output_dim={self.proj_output_dim} is too small for normalization=vmf: at "
                "least 3 (the paper uses 256)"
            )
        for key, value in self.teacher_temperatures().items():
            if value >= self.student_temperature:
                raise ValueError(
                    f"{key}={value} must be lower than student_temperature="
                    f"{self.student_temperature}: a teacher that is not sharper than the student "
                    "collapses to uniform outputs (DINO: teacher 0.04 to 0.07, student 0.1)"
                )

    def teacher_temperatures(self) -> dict[str, float]:
        """All temperatures of the teacher, by key."""
        return {"teacher_temperature": self.teacher_temperature}


@dataclass(frozen=True)
class DINOSettings(MethodSettings):
    """``method_kwargs`` of ``dino_multicrop`` and ``dino_vmf``.

    Names that solo-learn's own DINO has are kept; the published values are in ``configs/method/``.
    """

    warmup_teacher_temperature: Annotated[Positive, Doc("the teacher's at the start")] = 0.04
    warmup_teacher_temperature_epochs: Annotated[Whole, Doc("length of the warm-up")] = 0
    center_raw_scores: Annotated[
        bool, Doc("vmf with logit: leave log C_p(kappa) out of the center")
    ] = False
    clip_by: Annotated[
        Literal["parameter", "network"],
        Doc("whose norm clip_grad bounds: each tensor's, or that of backbone and heads (DINOv2)"),
    ] = "parameter"
    freeze_last_layer: Annotated[Whole, Doc("epochs in which the prototypes stay")] = 1
    freeze_by: Annotated[
        Literal["gradient", "rate"],
        Doc("how they stay: without gradient, or with learning rate 0 (DINOv2: moments go on)"),
    ] = "gradient"
    decay_magnitudes: Annotated[bool, Doc("weight decay on prototype norms, as in DINO")] = True
    # prototypes (docs/em.md)
    prototype_update: Annotated[
        Literal["gradient", "em"],
        Doc("what moves the prototypes; em: online EM on the teacher's embeddings (experimental)"),
    ] = "gradient"
    em_memory: Annotated[
        float, Ge(1), Doc("rows of its own that a component remembers (prototype_update=em)")
    ] = 64.0
    init_prototypes: Annotated[
        Literal["random", "kmeans", "em"],
        Doc("where they start: at random, or from embeddings of the first epoch (experimental)"),
    ] = "random"

    def check(self) -> None:
        """Refuse what every method refuses; ``center_raw_scores`` has a meaning in one cell alone."""
        super().check()
        if self.center_raw_scores and (self.normalization, self.centering) != ("vmf", "logit"):
            raise ValueError(
                "center_raw_scores=True has no meaning with "
                f"normalization={self.normalization}, centering={self.centering}: it leaves log C_p(kappa) "
                "out of the center of normalization=vmf, centering=logit"
            )
        if self.prototype_update == "em":
            if self.normalization != "vmf":
                raise ValueError(
                    f"prototype_update=em has no meaning with normalization={self.normalization}: EM finds "
                    "concentrations, which normalization=vmf alone makes use of"
                )
            for key in ("prototype_spread", "decay_magnitudes", "freeze_by"):
                if getattr(self, key) != getattr(type(self), key):
                    raise ValueError(
                        f"{key}={getattr(self, key)} has no meaning with prototype_update=em: the prototypes "
                        "are no parameters of the optimizer"
                    )
        elif self.em_memory != type(self).em_memory:
            raise ValueError(
                f"em_memory={self.em_memory} has no meaning with prototype_update=gradient: set "
                "prototype_update=em"
            )
        if self.init_prototypes != "random" and self.init_from is not None:
            raise ValueError(
                f"init_prototypes={self.init_prototypes} has no meaning with init_from, which brings its own "
                "prototypes: set init_prototypes=random"
            )

    def teacher_temperatures(self) -> dict[str, float]:
        """All temperatures of the teacher, by key."""
        return {
            **super().teacher_temperatures(),
            "warmup_teacher_temperature": self.warmup_teacher_temperature,
        }
