"""Pre-training without a solo-learn clone: what ``scripts/main_pretrain.py`` runs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar  # noqa: F401
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin import host, registry
from dinovmf_plugin.data.module import check_data, evaluation_loader, pretrain_loader
from dinovmf_plugin.host.checkpointer import Checkpointer, find_checkpoint, run_identity
from dinovmf_plugin.host.config import parse_cfg

__all__ = ["PretrainDataModule", "build_method", "build_trainer", "pretrain"]


class PretrainDataModule(LightningDataModule):
    """Training crops, and the labelled validation images if ``data.val_path`` is given."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def train_dataloader(self) -> Any:
        """This rank's share of the crops."""
        trainer = self.trainer
        assert trainer is not None
        return pretrain_loader(
            self.cfg,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=int(self.cfg.seed),
        )

    def val_dataloader(self) -> Any:
        """Centre crops for the online classifier and kNN; nothing without labels."""
        if self.cfg.data.val_path is None or self.cfg.data.no_labels:
            return []
        return evaluation_loader(self.cfg)


def build_method(cfg: DictConfig) -> Any:
    """The LightningModule that ``cfg.method`` names: the plugin's, or one of the host's own.

    Raises:
        ValueError: if nobody knows the method.
    """
    registry.register()
    if cfg.method not in host.METHODS or cfg.method in ("base", "linear"):
        known = sorted(set(host.METHODS) - {"base", "linear"})
        raise ValueError(f"method={cfg.method!r} is unknown: choose one of {', '.join(known)}")
    if cfg.method in registry.method_classes():
        return host.METHODS[cfg.method](cfg)
    return host.build_host_method(cfg)


def _logger(cfg: DictConfig) -> Logger:
    folder = Path(cfg.checkpoint.dir) / cfg.method / f"{cfg.name}-{run_identity(cfg)}"
    if not cfg.wandb.enabled:
        return CSVLogger(folder, name="", version="metrics")
    from lightning.pytorch.loggers import WandbLogger

    options = {k: cfg.wandb[k] for k in ("project", "entity", "offline") if k in cfg.wandb}
    return WandbLogger(name=cfg.name, save_dir=str(folder), **options)


def build_trainer(cfg: DictConfig, **overrides: Any) -> Trainer:
    """A Lightning Trainer from the config's own keys (those that ``Trainer`` knows)."""
    known = inspect.signature(Trainer.__init__).parameters
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs = {name: plain[name] for name in known if name in plain}
    kwargs.update(
        logger=_logger(cfg),
        callbacks=[TQDMProgressBar(refresh_rate=1)] if cfg.get("enable_progress_bar", True) else [],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        log_every_n_steps=cfg.get("log_every_n_steps", 10),
        num_sanity_val_steps=0,
    )
    kwargs.update(overrides)
    return Trainer(**kwargs)


def _resume_path(cfg: DictConfig) -> str | None:
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"resume_from_checkpoint={path} is not a file")
        return str(path)
    if cfg.auto_resume.enabled:
        path_found = find_checkpoint(cfg)
        if path_found is not None:
            print(f"resuming from {path_found}")
            return str(path_found)
    return None


def pretrain(cfg: DictConfig) -> Path | None:
    """Check the config and the data, then train.

    Args:
        cfg: a recipe as ``configs/`` has them (the format of solo-learn main).

    Returns:
        The final checkpoint, or None if ``checkpoint.enabled`` is false.

    Raises:
        ValueError, FileNotFoundError: for anything wrong in the config or the data, before training.
    """
    cfg = parse_cfg(cfg)
    seed_everything(cfg.seed, verbose=False)
    check_data(cfg)
    resume = _resume_path(cfg)
    model = build_method(cfg)
    trainer = build_trainer(cfg)
    if cfg.method not in registry.method_classes() and cfg.checkpoint.enabled:
        trainer.callbacks.append(Checkpointer(cfg))  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=PretrainDataModule(cfg), ckpt_path=resume, weights_only=True)
    found = [c for c in trainer.callbacks if isinstance(c, Checkpointer)]  # type: ignore[attr-defined]
    return found[0].last_ckpt if found else None
