"""The keys of a recipe, group by group: types, bounds, defaults and help.

``method_kwargs`` is the method's (``methods.settings``), ``augmentations`` the data recipe's
(``data.recipe``). ``schema`` checks what is given; ``keys`` refuses what nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen

from dinovmf_plugin.runs.bounds import Count, Path, Ratio, Seed, Share, Weight, Whole
from dinovmf_plugin.runs.settings import Doc, Settings, settings_of
from dinovmf_plugin.runs.sources import SourceKeys

__all__ = ["RECIPE", "default_of"]

Text = Annotated[str, MinLen(1)]
Rate = Annotated[float, Ge(0), Le(1e6)]


@dataclass(frozen=True, kw_only=True)
class RunKeys(Settings):
    """Keys at the top of a recipe; the arguments of Lightning's Trainer are keys, too."""

    name: Annotated[Text, Doc("of the run, in file names and loggers")]
    method: Annotated[Text, Doc("what is trained")]
    max_epochs: Annotated[Count, Doc("passes over the images")]
    seed: Annotated[Seed, Doc("of everything that is drawn")] = 5
    num_nodes: Annotated[Count, Doc("machines")] = 1
    accumulate_grad_batches: Annotated[Count, Doc("batches per step of the optimizer")] = 1
    log_every_n_steps: Annotated[Count, Doc("steps between two lines of a log")] = 50
    check_val_every_n_epoch: Annotated[Count, Doc("epochs between two validations")] = 1
    gradient_clip_val: Annotated[
        Weight | None, Doc("Lightning's clipping; see also method_kwargs.clip_grad")
    ] = None
    sync_batchnorm: Annotated[bool, Doc("statistics over all processes (GPUs only)")] = False
    debug_augmentations: Annotated[bool, Doc("show the crops and stop")] = False
    resume_from_checkpoint: Annotated[Path | None, Doc("a training checkpoint, only read")] = None


@dataclass(frozen=True, kw_only=True)
class BackboneKeys(Settings):
    """The network."""

    name: Annotated[Text, Doc("vit_tiny, vit_small, vit_base, resnet50 ...")]


@dataclass(frozen=True, kw_only=True)
class BackboneArguments(Settings):
    """Arguments of the network; timm has further ones."""

    img_size: Annotated[
        Count | Annotated[Sequence[Count], MinLen(1)], Doc("pixels, or [height, width]")
    ] = 224
    patch_size: Annotated[Count, Doc("side of a patch in pixels")] = 16
    drop_path_rate: Annotated[Share, Doc("stochastic depth of the student's last block")] = 0.0
    dynamic_img_size: Annotated[bool, Doc("other sizes than img_size are taken, too")] = True


@dataclass(frozen=True, kw_only=True)
class DataKeys(SourceKeys):
    """The images; the last three are counted, not given."""

    dataset: Annotated[Text, Doc("custom, imagenet, imagenet100 ...")]
    train_path: Annotated[
        Path, Doc("a folder of class folders, of images with no_labels, or what data.source reads")
    ]
    val_path: Annotated[Path | None, Doc("held-out images of the same classes")] = None
    format: Annotated[Text, Doc("image_folder (Pillow) or dali; h5: Pillow and source=h5")] = (
        "image_folder"
    )
    no_labels: Annotated[bool, Doc("leave labels alone; the folders are no classes")] = False
    fraction: Annotated[float, Ge(-1), Le(1), Doc("share of the images; -1: all")] = -1
    num_workers: Annotated[Whole, Doc("processes (DALI: threads) that read images")] = 4
    check_images: Annotated[Text, Doc("fast, full or none: look for unreadable images")] = "fast"
    skip_unreadable: Annotated[bool, Doc("leave them out instead of stopping")] = False
    num_classes: Annotated[Count | None, Doc("counted from the data")] = None
    num_large_crops: Annotated[Count | None, Doc("counted from the augmentations")] = None
    num_small_crops: Annotated[Whole | None, Doc("counted from the augmentations")] = None


@dataclass(frozen=True, kw_only=True)
class DaliKeys(Settings):
    """The loader with data.format=dali."""

    device: Annotated[Text, Doc("gpu or cpu: where pictures are decoded")] = "gpu"
    encode_indexes_into_labels: Annotated[bool, Doc("of solo-learn")] = False


@dataclass(frozen=True, kw_only=True)
class OptimizerKeys(Settings):
    """The optimizer."""

    name: Annotated[Text, Doc("adamw, sgd, lars ...")]
    batch_size: Annotated[Count, Doc("images per device")]
    lr: Annotated[Rate, Doc("times batch_size * devices * num_nodes / 256")]
    weight_decay: Annotated[Rate, Doc("at the start; see method_kwargs.final_weight_decay")]
    classifier_lr: Annotated[Rate, Doc("of the online classifier")] = 0.1
    base_lr: Annotated[Rate | None, Doc("lr before scaling: written, not given")] = None
    base_classifier_lr: Annotated[Rate | None, Doc("the same of classifier_lr")] = None
    exclude_bias_n_norm_wd: Annotated[bool, Doc("of solo-learn's own methods")] = False


@dataclass(frozen=True, kw_only=True)
class SchedulerKeys(Settings):
    """The learning rate over time."""

    name: Annotated[Text, Doc("warmup_cosine or none")]
    interval: Annotated[Text, Doc("step (epoch: solo-learn's own methods)")] = "step"
    min_lr: Annotated[Rate, Doc("end of the cosine")] = 0.0
    warmup_start_lr: Annotated[Rate, Doc("start of the warm-up")] = 3e-5
    warmup_epochs: Annotated[Weight, Doc("length of the warm-up")] = 10


@dataclass(frozen=True, kw_only=True)
class MomentumKeys(Settings):
    """The teacher's average."""

    base_tau: Annotated[Ratio, Doc("share of the old teacher at the start")] = 0.99
    final_tau: Annotated[Ratio, Doc("the same at the end of a cosine")] = 1.0
    classifier: Annotated[bool, Doc("of solo-learn's own methods")] = False


@dataclass(frozen=True, kw_only=True)
class CheckpointKeys(Settings):
    """Checkpoints while training."""

    enabled: Annotated[bool, Doc("write them")] = False
    dir: Annotated[Text, Doc("a folder per method and run below")] = "trained_models"
    frequency: Annotated[Whole, Doc("epochs between two")] = 1
    keep_prev: Annotated[bool, Doc("keep earlier ones")] = False


@dataclass(frozen=True, kw_only=True)
class AutoResumeKeys(Settings):
    """Going on with an interrupted run."""

    enabled: Annotated[bool, Doc("go on from the newest whole checkpoint of the same run")] = False
    max_hours: Annotated[Weight | None, Doc("of solo-learn: older ones are left alone")] = None


@dataclass(frozen=True, kw_only=True)
class LoggerKeys(Settings):
    """A logger."""

    enabled: Annotated[bool, Doc("log there")] = False


@dataclass(frozen=True, kw_only=True)
class CsvKeys(LoggerKeys):
    """Lightning's CSV logger, on unless it is switched off."""

    enabled: Annotated[bool, Doc("log there")] = True


@dataclass(frozen=True, kw_only=True)
class WandbKeys(LoggerKeys):
    """Weights and Biases."""

    project: Annotated[Text | None, Doc("of wandb.init")] = None
    entity: Annotated[Text | None, Doc("of wandb.init")] = None
    offline: Annotated[bool, Doc("write files only")] = False


@dataclass(frozen=True, kw_only=True)
class KnnKeys(Settings):
    """kNN of the teacher while training."""

    enabled: Annotated[bool, Doc("at every validation")] = False
    k: Annotated[Count, Doc("neighbors")] = 20
    distance_func: Annotated[Text, Doc("euclidean or cosine")] = "euclidean"


@dataclass(frozen=True, kw_only=True)
class PerformanceKeys(Settings):
    """Speed and memory."""

    compile: Annotated[bool, Doc("torch.compile the networks")] = False
    disable_channel_last: Annotated[bool, Doc("of solo-learn")] = False
    grad_checkpointing: Annotated[bool, Doc("compute activations again: less memory")] = False


@dataclass(frozen=True, kw_only=True)
class UmapKeys(Settings):
    """UMAP pictures of the validation images."""

    enabled: Annotated[bool, Doc("draw them (needs umap-learn)")] = False
    dir: Annotated[Text, Doc("a folder per method and run below")] = "auto_umap"
    frequency: Annotated[Count, Doc("epochs between two")] = 1


RECIPE: dict[str, type[Settings]] = {
    "": RunKeys,
    "backbone.": BackboneKeys,
    "backbone.kwargs.": BackboneArguments,
    "data.": DataKeys,
    "dali.": DaliKeys,
    "optimizer.": OptimizerKeys,
    "scheduler.": SchedulerKeys,
    "momentum.": MomentumKeys,
    "checkpoint.": CheckpointKeys,
    "auto_resume.": AutoResumeKeys,
    "csv.": CsvKeys,
    "wandb.": WandbKeys,
    "tensorboard.": LoggerKeys,
    "mlflow.": LoggerKeys,
    "knn_eval.": KnnKeys,
    "performance.": PerformanceKeys,
    "auto_umap.": UmapKeys,
}


def default_of(key: str) -> Any:
    """What a key of a recipe is when it is left out.

    Raises:
        KeyError: for a key that is not in ``RECIPE``.

    Example:
        >>> default_of("data.num_workers"), default_of("csv.enabled"), default_of("seed")
        (4, True, 5)
    """
    group, separator, name = key.rpartition(".")
    return settings_of(RECIPE[group + separator])[name].default
