"""solo-learn 1.0.2 (PyPI): backported to the API of main.

1.0.2 takes keyword arguments from argparse, names its networks ``encoder`` and ``momentum_encoder`` and
speaks the hooks of pytorch-lightning 1.4. This adapter translates the config, the names and the hooks; the
networks, the classifier, the metric functions and the optimizer choices stay the host's.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback as HostCheckpointer  # 1.0.2 has one of another Lightning
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from solo.methods import METHODS
from solo.methods.base import BaseMomentumMethod as _BaseMomentumMethod
from torch import Tensor

from dinovmf_plugin.host.backbones import EXTRA_BACKBONES, standing_in_release
from dinovmf_plugin.host.knn import check_distance, repair_knn
from dinovmf_plugin.host.lars import LARS

__all__ = ["BACKBONES", "BaseMomentumMethod", "HostCheckpointer", "build_host_method"]

BACKBONES = tuple(sorted({*_BaseMomentumMethod._SUPPORTED_ENCODERS, *EXTRA_BACKBONES}))
"""Names that ``backbone.name`` may have."""

_DEFAULTS: dict[str, Any] = {
    "backbone": {"kwargs": {}},
    "optimizer": {"exclude_bias_n_norm_wd": False, "kwargs": {}, "classifier_lr": 0.1},
    "accumulate_grad_batches": 1,
    "scheduler": {
        "lr_decay_steps": None,
        "min_lr": 0.0,
        "warmup_start_lr": 3e-5,
        "warmup_epochs": 10,
        "interval": "step",
    },
    "knn_eval": {"enabled": False, "k": 20, "distance_func": "euclidean"},
    "performance": {"disable_channel_last": False},
    "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": False},
    "method_kwargs": {},
}

_NEW_NAMES = {
    "encoder": "backbone",
    "momentum_encoder": "momentum_backbone",
    "encoder_name": "backbone_name",
}


def _fill_defaults(cfg: DictConfig) -> DictConfig:
    """main's defaults where the config says nothing; the config itself is changed, as main does."""
    for key, default in _DEFAULTS.items():
        if not isinstance(default, dict):
            if cfg.get(key) is None:
                cfg[key] = default
            continue
        if cfg.get(key) is None:
            cfg[key] = {}
        for name, value in default.items():
            if cfg[key].get(name) is None:
                cfg[key][name] = value
    check_distance(cfg.knn_eval.distance_func)  # 1.0.2 takes it nowhere: see _use_distance
    return cfg


def _use_distance(module: Any, cfg: DictConfig) -> None:
    """Let the online kNN use ``knn_eval.distance_func``; 1.0.2 has one distance only."""
    if module.knn_eval:
        module.knn.distance_fx = cfg.knn_eval.distance_func


def _keyword_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The config of main as the keyword arguments of 1.0.2."""
    kwargs = {
        "encoder": cfg.backbone.name,
        "num_classes": cfg.data.num_classes,
        "backbone_args": OmegaConf.to_container(cfg.backbone.kwargs, resolve=True),
        "max_epochs": cfg.max_epochs,
        "batch_size": cfg.optimizer.batch_size,
        "optimizer": cfg.optimizer.name,
        "lars": False,
        "lr": cfg.optimizer.lr,
        "weight_decay": cfg.optimizer.weight_decay,
        "classifier_lr": cfg.optimizer.classifier_lr,
        "exclude_bias_n_norm": cfg.optimizer.exclude_bias_n_norm_wd,
        "accumulate_grad_batches": cfg.accumulate_grad_batches,
        "extra_optimizer_args": OmegaConf.to_container(cfg.optimizer.kwargs, resolve=True),
        "scheduler": cfg.scheduler.name,
        "lr_decay_steps": cfg.scheduler.lr_decay_steps,
        "min_lr": cfg.scheduler.min_lr,
        "warmup_start_lr": cfg.scheduler.warmup_start_lr,
        "warmup_epochs": cfg.scheduler.warmup_epochs,
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
        "knn_eval": cfg.knn_eval.enabled,
        "knn_k": cfg.knn_eval.k,
        "base_tau_momentum": cfg.momentum.base_tau,
        "final_tau_momentum": cfg.momentum.final_tau,
        "momentum_classifier": cfg.momentum.classifier,
    }
    if cfg.backbone.name.startswith("resnet") or "swin" in cfg.backbone.name:
        kwargs["backbone_args"]["cifar"] = cfg.data.dataset in ("cifar10", "cifar100")
    return kwargs


class BaseMomentumMethod(_BaseMomentumMethod):
    """1.0.2's base class behind main's face: ``BaseMomentumMethod(cfg)``.

    Differs from upstream: names and hooks as described in the module; the defaults of main; the
    learning rate's, the EMA's and the validation hooks are left to the subclass, since those of 1.0.2
    address Lightning 1.4.
    """

    validation_epoch_end = None  # Lightning 2 refuses modules that still have this hook
    _OPTIMIZERS: ClassVar[dict[str, Any]] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "lars": LARS,
    }

    def __init__(self, cfg: DictConfig) -> None:
        cfg = self.add_and_assert_specific_cfg(cfg)
        with standing_in_release(cfg.backbone.name) as encoder:
            super().__init__(**{**_keyword_arguments(cfg), "encoder": encoder})
        self.cfg = cfg
        self.backbone_name = cfg.backbone.name
        self.exclude_bias_n_norm_wd = cfg.optimizer.exclude_bias_n_norm_wd
        self.scheduler_interval = cfg.scheduler.interval
        self.no_channel_last = cfg.performance.disable_channel_last
        self.validation_step_outputs: list[dict[str, Any]] = []
        _use_distance(self, cfg)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_NEW_NAMES.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        if name in _NEW_NAMES:
            return getattr(self, _NEW_NAMES[name])
        return super().__getattr__(name)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in main's defaults."""
        return _fill_defaults(cfg)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The host's parameter groups, under main's names."""
        groups = super().learnable_params
        for group in groups:
            group["name"] = _NEW_NAMES.get(group["name"], group["name"])
        return groups

    def forward(self, X: Tensor) -> dict[str, Any]:
        """Student features and online-classifier logits."""
        if not self.no_channel_last:
            X = X.to(memory_format=torch.channels_last)
        return self.base_forward(X)

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Any]:
        """Teacher features."""
        if not self.no_channel_last:
            X = X.to(memory_format=torch.channels_last)
        return self.base_momentum_forward(X)


def _adapted(cls: type) -> type:
    """A host method of 1.0.2 with the hooks of today's Lightning."""
    adapted: Any  # the subclass made below

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parent = super(adapted, self).on_train_batch_end
        if "dataloader_idx" in inspect.signature(parent).parameters:
            parent(outputs, batch, batch_idx, 0)
        else:
            parent(outputs, batch, batch_idx)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self._validation_outputs.append(super(adapted, self).validation_step(batch, batch_idx))

    def on_validation_epoch_end(self: Any) -> None:
        outputs, self._validation_outputs = self._validation_outputs, []
        cls.validation_epoch_end(self, outputs)  # type: ignore[attr-defined]

    def __init__(self: Any, cfg: DictConfig, **kwargs: Any) -> None:
        super(adapted, self).__init__(**kwargs)
        self.cfg = cfg
        _use_distance(self, cfg)
        self._validation_outputs = []

    body: dict[str, Any] = {
        "__init__": __init__,
        "validation_step": validation_step,
        "validation_epoch_end": None,  # Lightning 2 refuses modules that still have this hook
        "on_validation_epoch_end": on_validation_epoch_end,
    }
    if hasattr(cls, "on_train_batch_end"):
        body["on_train_batch_end"] = on_train_batch_end
    if cls.clip_gradients is not LightningModule.clip_gradients:  # type: ignore[attr-defined]
        # DINO's clip_gradients(clip) hides Lightning's method of that name: serve both callers
        def clip_gradients(self: Any, *args: Any, **kwargs: Any) -> None:
            own = len(args) == 1 and isinstance(args[0], (int, float))
            owner: Any = cls if own else LightningModule
            owner.clip_gradients(self, *args, **kwargs)

        body["clip_gradients"] = clip_gradients
    adapted = type(cls.__name__, (cls,), body)
    return adapted


def build_host_method(cfg: DictConfig) -> Any:
    """Build one of the host's own methods from a config of main.

    Raises:
        ValueError: if the method asks for an argument that the config does not give.
    """
    cfg = _fill_defaults(cfg)
    cls = METHODS[cfg.method]
    kwargs = {
        **_keyword_arguments(cfg),
        **OmegaConf.to_container(cfg.method_kwargs, resolve=True),  # type: ignore[dict-item]
    }
    if not issubclass(cls, _BaseMomentumMethod):
        for name in ("base_tau_momentum", "final_tau_momentum", "momentum_classifier"):
            kwargs.pop(name)
    try:
        with standing_in_release(cfg.backbone.name) as encoder:
            return _adapted(cls)(cfg, **{**kwargs, "encoder": encoder})
    except TypeError as error:
        raise ValueError(f"method={cfg.method} of solo-learn 1.0.2: {error}") from error


repair_knn()
