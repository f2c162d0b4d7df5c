"""Where a run's numbers go: Lightning's own loggers, several at once, each a node of the config.

=============  ========  ==========================================================================
node           default   Lightning's class, and what the node may hold besides ``enabled``
=============  ========  ==========================================================================
csv            on        ``CSVLogger``: ``metrics/version_N/metrics.csv`` in the run's folder
wandb          off       ``WandbLogger``: project, entity, offline (solo-learn's), group, tags, notes ...
tensorboard    off       ``TensorBoardLogger``: ``tensorboard/version_N/`` in the run's folder
mlflow         off       ``MLFlowLogger``: experiment_name, tracking_uri, ...
=============  ========  ==========================================================================

All of them are given the whole resolved config. A resumed run goes on under its id at wandb and MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin.runs.files import write_json
from dinovmf_plugin.training.schema import LOGGERS

__all__ = ["RunIds", "build_loggers", "close_loggers", "log_config", "stored_run_ids"]

_FILE = "run_ids.json"


def _csv(cfg: DictConfig, folder: Path, run_id: str | None, given: dict[str, Any]) -> Logger:
    return CSVLogger(folder, **{"name": "metrics"} | given)  # version_0, _1 ..: one per start


def _tensorboard(
    cfg: DictConfig, folder: Path, run_id: str | None, given: dict[str, Any]
) -> Logger:
    own: dict[str, Any] = {"name": "tensorboard", "default_hp_metric": False}
    return TensorBoardLogger(folder, **own | given)


def _wandb(cfg: DictConfig, folder: Path, run_id: str | None, given: dict[str, Any]) -> Logger:
    own: dict[str, Any] = {"name": cfg.name, "save_dir": str(folder)}
    resumed = {} if run_id is None else {"id": run_id, "resume": "allow"}
    return WandbLogger(**own | resumed | given)


def _mlflow(cfg: DictConfig, folder: Path, run_id: str | None, given: dict[str, Any]) -> Logger:
    own: dict[str, Any] = {"experiment_name": "dinovmf", "run_name": cfg.name, "run_id": run_id}
    return MLFlowLogger(**own | given)


_BUILDERS: dict[str, Callable[..., Logger]] = {
    "csv": _csv,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}


def build_loggers(
    cfg: DictConfig, folder: Path, run_ids: Mapping[str, str] | None = None
) -> list[Logger]:
    """The loggers that the config enables.

    Args:
        cfg: a parsed config.
        folder: the run's folder.
        run_ids: of a resumed run, see ``stored_run_ids``.

    Returns:
        Lightning loggers; none if all are off.

    Raises:
        ImportError: if the package of an enabled logger is not installed.
    """
    loggers = []
    for name in LOGGERS:
        node: Any = OmegaConf.to_container(cfg[name], resolve=True)
        if not node.pop("enabled"):
            continue
        given = {key: value for key, value in node.items() if value is not None}
        try:
            loggers.append(_BUILDERS[name](cfg, folder, (run_ids or {}).get(name), given))
        except ImportError as error:
            raise ImportError(
                f"{name}.enabled=True needs a package: pip install 'dinovmf-plugin[{name}]'"
            ) from error
    return loggers


def log_config(loggers: Iterable[Logger], cfg: DictConfig, run_ids: Mapping[str, str]) -> None:
    """Give every logger the whole resolved config (MLflow, which refuses changes, only of a new run).

    Raises:
        ValueError: if wandb cannot start, which without a key or a network it does not.
    """
    whole: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and "mlflow" in run_ids:
            continue
        try:
            logger.log_hyperparams(whole)
        except Exception as error:
            if not (isinstance(logger, WandbLogger) and type(error).__module__.startswith("wandb")):
                raise
            raise ValueError(
                f"wandb.enabled=True cannot start ({str(error).splitlines()[0]}): run `wandb login`, set "
                "WANDB_API_KEY, or set wandb.offline=True"
            ) from error


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End the run at wandb: the next one of this process would go on in it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()


def stored_run_ids(folder: Path) -> dict[str, str]:
    """The ids at wandb and MLflow of the run whose folder it is; empty if there are none."""
    file = folder / _FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class RunIds(Callback):
    """Keeps the ids at wandb and MLflow beside the checkpoints, for a resumed run to go on under them."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write ``run_ids.json`` into the run's folder."""
        if not trainer.is_global_zero or getattr(pl_module, "run_folder", None) is None:
            return
        ids = {}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                ids["wandb"] = str(logger.version)
            elif isinstance(logger, MLFlowLogger):
                ids["mlflow"] = str(logger.run_id)
        if ids:
            write_json(Path(pl_module.run_folder) / _FILE, ids)
