"""Pre-training without a solo-learn clone: what ``scripts/main_pretrain.py`` runs."""

from __future__ import annotations

import difflib
import inspect
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinovmf_plugin import host, registry
from dinovmf_plugin.checkpoints.reading import read_file
from dinovmf_plugin.data.module import pretrain_loader, validation_loader
from dinovmf_plugin.data.recipe import parse_recipe
from dinovmf_plugin.data.sampling import ResumableLoader
from dinovmf_plugin.training.checkpointer import Checkpointer
from dinovmf_plugin.training.config import parse_cfg
from dinovmf_plugin.training.folders import choose_folder, find_checkpoint, lock_run, make_folder
from dinovmf_plugin.training.loggers import (
    RunIds,
    build_loggers,
    close_loggers,
    log_config,
    stored_run_ids,
)
from dinovmf_plugin.training.peers import PeerWatch
from dinovmf_plugin.training.progress import LossProgressBar
from dinovmf_plugin.training.resuming import check_content, check_tensors
from dinovmf_plugin.training.stored_config import StoredConfig
from dinovmf_plugin.training.umap import umap_callbacks

__all__ = ["LoaderWorkerError", "PretrainDataModule", "build_method", "build_trainer", "pretrain"]


class LoaderWorkerError(RuntimeError):
    """A process that reads images died: killed for its memory, crashed, or ended by somebody."""


class PretrainDataModule(LightningDataModule):
    """Training crops, and the labeled validation images if ``data.val_path`` is given."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.training: ResumableLoader | None = None
        self.validation: Any = None

    def _place(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            "device_id": self.trainer.local_rank,
        }

    def train_dataloader(self) -> Any:
        """This rank's share of the crops; what later epochs need is looked at here, too."""
        self.training = pretrain_loader(self.cfg, **self._place())
        if self.cfg.data.val_path is not None and not self.cfg.data.no_labels:
            self.validation = validation_loader(self.cfg, **self._place())
        return self.training

    def close(self) -> None:
        """End the processes that read images, however training ended."""
        if self.training is not None:
            self.training.close()

    def val_dataloader(self) -> Any:
        """Center crops for the online classifier and kNN; nothing without labels."""
        return [] if self.validation is None else self.validation


def build_method(cfg: DictConfig) -> Any:
    """The LightningModule that ``cfg.method`` names: the plugin's, or one of the host's own.

    Raises:
        ValueError: if nobody knows the method, or it cannot be built from the config.
    """
    registry.register()
    if cfg.method not in host.METHODS or cfg.method in ("base", "linear"):
        known = sorted(set(host.METHODS) - {"base", "linear"})
        raise ValueError(f"method={cfg.method!r} is unknown: choose one of {', '.join(known)}")
    if cfg.backbone.name not in host.BACKBONES:
        raise ValueError(
            f"backbone.name={cfg.backbone.name!r} is not in the solo-learn that is installed: choose one of "
            f"{', '.join(host.BACKBONES)}"
        )
    _check_switches(cfg)
    try:
        if cfg.method in registry.method_classes():
            model = host.METHODS[cfg.method](cfg)
        else:
            model = host.build_host_method(cfg)
    except (
        TypeError,
        AssertionError,
    ) as error:  # a keyword that a network lacks, a value it refuses
        given = OmegaConf.to_container(cfg.backbone)
        raise ValueError(f"backbone={given} cannot be built: {error}") from error
    _try_crops(model, cfg)
    _check_optimizer(model, cfg)
    return model


def _check_switches(cfg: DictConfig) -> None:
    for switch in ("compile", "grad_checkpointing"):
        wanted = OmegaConf.select(cfg, f"performance.{switch}", default=False)
        if wanted and cfg.method not in registry.method_classes():
            raise ValueError(
                f"performance.{switch}=True is for this project's methods, and method={cfg.method} is "
                "solo-learn's: set it to False"
            )


@torch.no_grad()
def _try_crops(model: Any, cfg: DictConfig) -> None:
    """A crop of every size through the network, alone: what it refuses is told before training."""
    if cfg.get("augmentations") is None:  # not a whole recipe: its crops come from elsewhere
        return
    if any(parameter.is_meta for parameter in model.parameters()):  # shapes alone, nothing to try
        return
    recipe = parse_recipe(cfg.augmentations, dataset=cfg.data.dataset)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # moves no statistics and draws no random number
    try:
        for size in sorted({crop.size for crop in recipe}):
            try:
                model(torch.zeros(2, 3, size, size))
            except Exception as error:
                name, kwargs = cfg.backbone.name, OmegaConf.to_container(cfg.backbone.kwargs)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"backbone.name={name} with backbone.kwargs={kwargs} does not take crops of {size} x "
                    f"{size} px in three colors: {reason}"
                ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _check_optimizer(model: Any, cfg: DictConfig) -> None:
    """``optimizer.kwargs`` are arguments of the optimizer that ``optimizer.name`` names."""
    known_names = getattr(model, "_OPTIMIZERS", None)
    if not isinstance(known_names, Mapping) or cfg.optimizer.name not in known_names:
        return
    own = {"self", "params", "lr", "weight_decay"}
    known = [
        name
        for name in inspect.signature(known_names[cfg.optimizer.name]).parameters
        if name not in own
    ]
    for key in cfg.optimizer.get("kwargs") or {}:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(
                f"optimizer.kwargs.{key} is no argument of optimizer.name={cfg.optimizer.name}: {hint}"
            )
    given: Any = OmegaConf.to_container(cfg.optimizer.get("kwargs") or OmegaConf.create({}))
    try:
        known_names[cfg.optimizer.name]([nn.Parameter(torch.zeros(1))], lr=0.1, **given)
    except Exception as error:
        raise ValueError(
            f"optimizer.kwargs={given} is refused by optimizer.name={cfg.optimizer.name}: {error}"
        ) from error


def build_trainer(
    cfg: DictConfig,
    callbacks: Sequence[Callback] = (),
    run_ids: Mapping[str, str] | None = None,
) -> Trainer:
    """A Lightning Trainer from the config's own keys (those that ``Trainer`` knows), with its loggers.

    Args:
        cfg: a parsed config with ``checkpoint.folder``.
        callbacks: further Lightning callbacks.
        run_ids: ids of the resumed run at wandb and MLflow.

    Raises:
        ValueError: if it refuses one of them.
        ImportError: if the package of an enabled logger is not installed.
    """
    known = inspect.signature(Trainer.__init__).parameters
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs = {name: plain[name] for name in known if name in plain}
    progress = cfg.get("enable_progress_bar", True)
    kwargs.update(
        logger=build_loggers(cfg, Path(cfg.checkpoint.folder), run_ids) or False,
        callbacks=[*callbacks, *([LossProgressBar()] if progress else [])],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=cfg.checkpoint.folder,  # where Lightning looks for its own under SLURM
        log_every_n_steps=cfg.get("log_every_n_steps", 10),
        num_sanity_val_steps=0,
    )
    try:
        trainer = Trainer(**kwargs)
    except (MisconfigurationException, TypeError, ValueError) as error:
        reason = str(error).strip()
        given = {name: f"{name}={plain[name]!r}" for name in known if name in plain}
        words = set(re.findall(r"[\w-]+", reason))  # Lightning names the key, or its value alone
        meant = [text for name, text in given.items() if {name, str(plain[name])} & words]
        raise ValueError(
            f"Lightning's Trainer refuses {', '.join(meant) or 'the recipe'}: {' '.join(reason.split())}"
        ) from error
    log_config(trainer.loggers, cfg, run_ids or {})
    return trainer


def _resume_path(cfg: DictConfig) -> tuple[str | None, Path]:
    """The checkpoint to go on from, and the folder to write to.

    A named checkpoint is read and nothing else: the run has a folder of its own, and its own checkpoints come
    first when ``auto_resume`` looks for them.
    """
    found = find_checkpoint(cfg) if cfg.auto_resume.enabled else None
    folder = choose_folder(cfg, found)
    if found is not None:
        print(f"resuming from {found}")
        return str(found), folder
    if cfg.resume_from_checkpoint is None:
        return None, folder
    path = Path(cfg.resume_from_checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"resume_from_checkpoint={path} is not a file")
    print(f"resuming from {path}; this run's own files go to {folder}")
    return str(path), folder


def _check_resumable(path: str, cfg: DictConfig, model: Any) -> None:
    """Refuse a file that cannot be resumed before anything is started.

    Raises:
        ValueError: one sentence that names the file and what is wrong with it.
    """
    try:
        content = read_file(path, mapped=True)
        check_content(content, path, cfg.max_epochs)
        if isinstance(model, StoredConfig):
            model.check_checkpoint(content)
        else:
            check_tensors(content["state_dict"], model)
    except ValueError as error:
        named = f"resume_from_checkpoint={path}" if path == cfg.resume_from_checkpoint else path
        told = str(error).removeprefix(path)
        raise ValueError(f"{named}{told if told != str(error) else f': {error}'}") from error


def pretrain(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> Path | None:
    """Check the config and the data, then train.

    Args:
        cfg: a recipe as ``configs/`` has them (the format of solo-learn main); left as it is.
        callbacks: further Lightning callbacks.

    Returns:
        The final checkpoint, or None if ``checkpoint.enabled`` is false.

    Raises:
        ValueError, FileNotFoundError: for anything wrong in the config or the data, before training.
        OSError: if a checkpoint cannot be written; the one before it stays.
        LoaderWorkerError: if a process that reads images dies.
    """
    cfg = parse_cfg(cfg)
    lock = lock_run(cfg)
    try:
        return _pretrain(cfg, callbacks)
    finally:
        if lock is not None:
            lock.release()


def _pretrain(cfg: DictConfig, callbacks: Sequence[Callback]) -> Path | None:
    resume, folder = _resume_path(cfg)
    cfg.checkpoint.folder = str(folder)
    make_folder(folder, cfg)
    seed_everything(cfg.seed, verbose=False)
    model = build_method(cfg)
    if resume is not None:
        _check_resumable(resume, cfg, model)
    if not cfg.performance.disable_channel_last and not cfg.backbone.name.startswith("vit_"):
        model = model.to(memory_format=torch.channels_last)  # convolutions follow their weights
    trainer = build_trainer(cfg, [*callbacks, *umap_callbacks(cfg)], stored_run_ids(folder))
    if cfg.debug_augmentations:
        for number, crop in enumerate(parse_recipe(cfg.augmentations, dataset=cfg.data.dataset), 1):
            print(f"crop {number}: {crop}")
    if cfg.method not in registry.method_classes():  # the plugin's methods bring theirs along
        brought = [Checkpointer(cfg), RunIds()] if cfg.checkpoint.enabled else []
        trainer.callbacks += [*brought, PeerWatch()]  # type: ignore[attr-defined]
    data = PretrainDataModule(cfg)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises weights_only=False
        raise ValueError(f"{resume} holds pickled objects other than weights") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).split(". ", 1)[0].rstrip(".")
        raise LoaderWorkerError(
            f"{reason}, which for a process that reads images mostly means too little memory: lower "
            "data.num_workers; finished epochs are on disk, auto_resume.enabled=True goes on from there"
        ) from error
    finally:
        data.close()
        close_loggers(trainer.loggers)
    found = [c for c in trainer.callbacks if isinstance(c, Checkpointer)]  # type: ignore[attr-defined]
    return found[0].last_ckpt if found else None
