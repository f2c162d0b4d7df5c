"""What is compared: a method or recipe with some settings changed, a seed, and its resolved recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dinovmf_plugin import registry

__all__ = ["Candidate", "compose_recipe", "list_recipes", "sweep_values"]


@dataclass(frozen=True)
class Candidate:
    """One row of a table.

    Attributes:
        method: one of the plugin's methods, or None to keep the recipe's.
        recipe: a config such as ``imagenet/dino_vits16`` in place of the comparison's recipe, or None.
        settings: ``method_kwargs`` that differ from the recipe's.
    """

    method: str | None
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, key: str = "methods") -> Candidate:
        """Read ``NAME`` or ``NAME:key=value,key=value``; a NAME with a slash is a recipe.

        Raises:
            ValueError: for an unknown method or a malformed setting.

        Example:
            >>> Candidate.parse("dino_multicrop:normalization=l2,clip_grad=0.3").settings
            {'normalization': 'l2', 'clip_grad': 0.3}
            >>> Candidate.parse("imagenet/dino_vits16").recipe
            'imagenet/dino_vits16'
        """
        name, _, rest = str(text).partition(":")
        settings: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            setting, equals, value = part.partition("=")
            if not equals or not setting.strip() or not value.strip():
                raise ValueError(
                    f"{key}: {text!r} is not understood at {part!r}: write NAME:key=value,key=value with "
                    "keys of method_kwargs"
                )
            settings[setting.strip()] = _number(value.strip())
        if "/" in name:
            return cls(None, name, settings)
        check_method(name, key)
        return cls(name, None, settings)

    @property
    def label(self) -> str:
        """Name in tables.

        Example:
            >>> Candidate("dino_multicrop", settings={"normalization": "l2"}).label
            'dino_multicrop normalization=l2'
        """
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return " ".join(filter(None, [self.method or self.recipe, settings])) or "recipe"


def _number(text: str) -> Any:
    """A YAML scalar: numbers and booleans as such."""
    return OmegaConf.create(f"value: {text}").value


def check_method(name: str, key: str) -> None:
    """Raise a ValueError that names the key unless the plugin has the method."""
    known = sorted(registry.method_classes())
    if name not in known:
        raise ValueError(
            f"{key}: method {name!r} is unknown: choose from {', '.join(known)}, or name a recipe such as "
            "imagenet/dino_vits16"
        )


def sweep_values(values: Sequence[Any]) -> str:
    """A list as hydra's sweeps write it: quoted values, separated by commas; ``null`` for an empty one.

    Example:
        >>> sweep_values(["dino_vmf", "dino_multicrop:normalization=l2"])
        "'dino_vmf','dino_multicrop:normalization=l2'"
        >>> sweep_values([0, 1, None])
        '0,1,null'
    """
    words = []
    for value in values or [None]:
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            words.append(f"'{escaped}'")
        else:
            words.append("null" if value is None else str(value))
    return ",".join(words)


def list_recipes() -> dict[str, str]:
    """Every recipe of ``configs/`` with what its own first line tells, by name.

    Example:
        >>> list_recipes()["custom/dino_vmf"]
        'DINO-vMF ViT-S/16 on a folder of images: data.train_path=DIR [data.no_labels=True].'
    """
    found = {}
    for folder in files("dinovmf_plugin.configs").iterdir():
        for entry in folder.iterdir() if folder.is_dir() else ():
            if not entry.name.endswith(".yaml"):
                continue
            lines = entry.read_text(encoding="utf-8").splitlines()
            if any(line.strip().startswith("- /method:") for line in lines):
                told = [line for line in lines if line.startswith("# ") and "@package" not in line]
                name = f"{folder.name}/{entry.name.removesuffix('.yaml')}"
                found[name] = told[0].removeprefix("# ") if told else ""
    return dict(sorted(found.items()))


@contextmanager
def _composing() -> Iterator[None]:
    """Within a hydra application its search path is used, which knows the user's --config-dir."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_module("dinovmf_plugin.configs", version_base="1.2"):
        yield


def _leave_out_foreign_settings(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Drop the recipe's ``method_kwargs`` that its method does not have.

    One recipe serves several methods: a teacher temperature to warm up from means nothing to MSN. What the
    user named in ``overrides`` stays, so that a mistake there is refused.
    """
    method = registry.method_classes().get(cfg.method)
    if method is None:
        return
    known = {item.name for item in fields(method.settings_class)}
    named = " ".join(overrides)
    for key in [str(key) for key in cfg.method_kwargs]:
        if key not in known and f"method_kwargs.{key}=" not in named:
            del cfg.method_kwargs[key]


def compose_recipe(
    recipe: str,
    candidate: Candidate,
    *,
    seed: int,
    lr: float | None = None,
    overrides: Sequence[str] = (),
    data: Mapping[str, str | None] | None = None,
    checkpoint_dir: str = "trained_models",
) -> DictConfig:
    """The recipe of one run, not yet parsed (``host.config.parse_cfg`` scales the learning rate).

    ``method_kwargs`` of the recipe that the method does not have are left out; the run's ``result.json``
    holds what is left.

    Args:
        recipe: config of the recipe, unless the candidate names its own.
        candidate: what differs between rows.
        seed: of the run.
        lr: ``optimizer.lr`` before scaling; None keeps the recipe's.
        overrides: in hydra's syntax, the same for all runs.
        data: ``train_path`` and ``val_path``; None keeps the recipe's.
        checkpoint_dir: the run's folder is made there.

    Raises:
        ValueError: if there is no such recipe, or an override does not fit it.
    """
    name = candidate.recipe or recipe
    arguments = [*overrides]
    try:
        with _composing():
            cfg = compose(config_name=name, overrides=arguments)
            # the recipe's own method may be a variant of it: l2 for DINO's ViT-B
            if candidate.method not in (None, cfg.method):
                arguments.append(f"method={candidate.method}")
                cfg = compose(config_name=name, overrides=arguments)
    except HydraException as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"recipe={name!r} with overrides={arguments}: {first}") from error
    OmegaConf.set_struct(cfg, False)
    _leave_out_foreign_settings(cfg, overrides)
    for key, value in candidate.settings.items():
        OmegaConf.update(cfg, f"method_kwargs.{key}", value, force_add=True)
    for key, path in (data or {}).items():
        if path is not None:
            OmegaConf.update(cfg, f"data.{key}", str(path), force_add=True)
    cfg.seed = seed
    if lr is not None:
        cfg.optimizer.lr = lr
    slug = re.sub(r"[^\w.]+", "-", candidate.label).strip("-")
    cfg.name = f"{slug}{'' if lr is None else f'-lr{lr:g}'}-seed{seed}"
    OmegaConf.update(cfg, "checkpoint.enabled", True, force_add=True)
    OmegaConf.update(cfg, "checkpoint.dir", checkpoint_dir, force_add=True)
    OmegaConf.update(cfg, "auto_resume.enabled", True, force_add=True)
    return cfg
