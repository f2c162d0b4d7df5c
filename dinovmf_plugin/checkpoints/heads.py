"""A stored projection head with the settings that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dinovmf_plugin.checkpoints.layouts import StoredWeights, Which, read_weights
from dinovmf_plugin.core.heads import DINOHead
from dinovmf_plugin.core.prototypes import NORMALIZATIONS, Normalization

__all__ = ["HeadSettings", "head_from", "load_head", "with_head"]


@dataclass(frozen=True)
class HeadSettings:
    """How a head turns features into a mixture.

    Attributes:
        student_temperature: temperature of the student's softmax.
        teacher_temperature: final temperature of the teacher's softmax (MSN: 0.1 sharpened by
            ``T = 0.25`` is a temperature of 0.025).
        normalization: ``none``, ``l2`` or ``vmf`` (see ``Prototypes``).
        centering: ``logit``, ``probability`` or ``sinkhorn``.
        method: name of the method, such as ``dino`` or ``ibot_vmf``.
        normalizer_order: order of the vMF normalizer's expansion.
        center_raw_scores: whether the center of ``vmf`` with ``logit`` averages raw scores.
        patch_prototypes: ``shared`` or ``separate`` prototypes for patches (iBOT); None without any.
        teacher_patch_temperature: the teacher's final temperature for patches (iBOT); None without any.
        assumed: fields that the file did not tell and that are the method's defaults.
    """

    student_temperature: float
    teacher_temperature: float
    normalization: Normalization
    centering: str
    method: str
    normalizer_order: int = 0
    center_raw_scores: bool = False
    patch_prototypes: str | None = None
    teacher_patch_temperature: float | None = None
    assumed: tuple[str, ...] = ()


_DEFAULTS: dict[str, dict[str, Any]] = {
    "msn": {"student_temperature": 0.1, "teacher_temperature": 0.025, "centering": "sinkhorn"},
    "dino": {"student_temperature": 0.1, "teacher_temperature": 0.07, "centering": "logit"},
}
_DEFAULTS["ibot"] = _DEFAULTS["dino"]

_MSN_SHARPENING = 0.25
_PATCH = "patch."  # a head of the patches' own


def _told(stored: StoredWeights) -> dict[str, Any]:
    """Settings that the file itself tells, under this project's names."""
    config = stored.config
    if stored.source == "msn":
        temperature = config.get("temperature")
        if not isinstance(temperature, float):
            return {"normalization": "l2"}
        return {
            "normalization": "l2",
            "student_temperature": temperature,
            "teacher_temperature": temperature * _MSN_SHARPENING,
        }
    nested = config.get("method_kwargs")
    flat = {**config, **(nested if isinstance(nested, Mapping) else {})}
    if stored.source == "timm":
        own = config.get("dinovmf_plugin")
        flat = dict(own.get("head") or {}) if isinstance(own, Mapping) else {}
    told = {name: flat.get(name) for name in HeadSettings.__dataclass_fields__}
    if told["teacher_temperature"] is None:
        told["teacher_temperature"] = flat.get("teacher_temp")  # official DINO and iBOT
    if told["teacher_patch_temperature"] is None:
        told["teacher_patch_temperature"] = flat.get("teacher_patch_temp")
    if told["normalization"] is None and isinstance(flat.get("norm_last_layer"), bool):
        told["normalization"] = "l2" if flat["norm_last_layer"] else "none"
    return {name: value for name, value in told.items() if value is not None}


def _settings(stored: StoredWeights, head: Mapping[str, Tensor]) -> HeadSettings:
    told = _told(stored)
    guessed = tuple(told.pop("assumed", ()))  # by an earlier import
    family = str(told.get("method", stored.source)).partition("_")[0]
    if stored.source == "dinovmf_plugin" and "normalization" not in told:
        raise ValueError(
            f"{stored.path} does not tell method_kwargs.normalization (none, l2 or vmf), without which "
            "its prototypes have no meaning: put the run's args.json beside it"
        )
    ones = bool((head["last_layer.weight_g"] == 1).all())
    assumed = {
        "method": family if family in _DEFAULTS else "dino",
        "normalization": "l2" if ones else "none",
        **_DEFAULTS.get(family, _DEFAULTS["dino"]),
    }
    patch = stored.head.get("last_layer2.weight_v")
    if patch is not None:
        same = torch.equal(patch, stored.head["last_layer.weight_v"])
        told["patch_prototypes"] = "shared" if same else "separate"
    if f"{_PATCH}last_layer.weight_v" in stored.head:
        told["patch_prototypes"] = "separate"
    values = {**assumed, **told}
    patch_tau = values.get("teacher_patch_temperature")
    if values["normalization"] not in NORMALIZATIONS:
        raise ValueError(
            f"{stored.path}: normalization={values['normalization']!r} is none of {NORMALIZATIONS}"
        )
    return HeadSettings(
        student_temperature=float(values["student_temperature"]),
        teacher_temperature=float(values["teacher_temperature"]),
        normalization=cast(Normalization, values["normalization"]),
        centering=str(values["centering"]),
        method=str(values["method"]),
        normalizer_order=int(values.get("normalizer_order", 0)),
        center_raw_scores=bool(values.get("center_raw_scores", False)),
        patch_prototypes=values.get("patch_prototypes"),
        teacher_patch_temperature=None if patch_tau is None else float(patch_tau),
        assumed=tuple(name for name in assumed if name not in told or name in guessed),
    )


def _build(
    stored: StoredWeights, tensors: Mapping[str, Tensor], settings: HeadSettings
) -> DINOHead:
    path = stored.path
    activation = stored.config.get("act_in_head", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"{path}: heads with act_in_head={activation!r} are not supported, only gelu"
        )
    layers = [
        v
        for k, v in tensors.items()
        if k.startswith("mlp.") and k.endswith(".weight") and v.ndim == 2
    ]
    use_bn = any(name.endswith("running_mean") for name in tensors)
    head = DINOHead(
        in_dim=layers[0].shape[1],
        hidden_dim=layers[0].shape[0],
        bottleneck_dim=layers[-1].shape[0],
        num_prototypes=tensors["last_layer.weight_v"].shape[0],
        normalization=settings.normalization,
        num_layers=len(layers),
        use_bn=use_bn,
        order=settings.normalizer_order,
    )
    own = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if own != found:
        wrong = sorted(name for name in {*own, *found} if own.get(name) != found.get(name))
        raise ValueError(
            f"{path}: the projection head is no DINO head; these tensors differ: {', '.join(wrong)}"
        )
    head.load_state_dict(dict(tensors))
    return head.eval()


def head_from(stored: StoredWeights, tokens: str = "cls") -> tuple[DINOHead, HeadSettings]:
    """``load_head`` for weights that are read already; same errors."""
    if tokens not in ("cls", "patch"):
        raise ValueError(f"tokens={tokens!r} is unknown: choose 'cls' or 'patch'")
    needed = ("last_layer.weight_v", "last_layer.weight_g")
    has_mlp = any(name.startswith("mlp.") for name in stored.head)
    if not has_mlp or any(name not in stored.head for name in needed):
        held = f"only {', '.join(stored.head)}" if stored.head else "no projection head"
        raise ValueError(
            f"{stored.path} holds {held}: a head needs mlp.* and last_layer.weight_g and .weight_v "
            "(backbone-only files have none)"
        )
    settings = _settings(stored, stored.head)
    others = ("last_layer2.", _PATCH)
    tensors = {k: v for k, v in stored.head.items() if not k.startswith(others)}
    if tokens == "cls":
        return _build(stored, tensors, settings), settings
    if f"{_PATCH}last_layer.weight_v" in stored.head:
        own = [k for k in stored.head if k.startswith(_PATCH)]
        tensors = {k.removeprefix(_PATCH): stored.head[k] for k in own}
    elif settings.patch_prototypes == "separate":
        for name in ("weight_g", "weight_v"):
            tensors[f"last_layer.{name}"] = stored.head[f"last_layer2.{name}"]
    if settings.teacher_patch_temperature is not None:
        settings = replace(settings, teacher_temperature=settings.teacher_patch_temperature)
    return _build(stored, tensors, settings), settings


def with_head(stored: StoredWeights) -> StoredWeights:
    """Add head and center that an imported or exported ``NAME.safetensors`` has beside it, if any."""
    beside = stored.path.with_suffix(".head.safetensors")
    if stored.head or stored.path.suffix != ".safetensors" or not beside.is_file():
        return stored
    head = read_weights(beside)
    mixture = stored.path.with_suffix(".mixture.safetensors")
    center = read_weights(mixture).backbone.get("center") if mixture.is_file() else None
    return replace(stored, head=head.backbone, config=head.config, center=center)


def load_head(
    path: str | Path, *, which: Which = "teacher", tokens: str = "cls"
) -> tuple[DINOHead, HeadSettings]:
    """Load a projection head with its prototypes.

    Args:
        path: see ``load_backbone``. A ``.safetensors`` file has its head in ``NAME.head.safetensors``
            beside it.
        which: ``teacher`` or ``student``. MSN keeps one set of prototypes for both.
        tokens: ``cls``, or ``patch`` for the head of the patches, which is the same unless
            ``settings.patch_prototypes`` is ``separate``: other prototypes (iBOT's ``last_layer2``), or a
            whole head (``patch_head=separate``, DINOv2).

    Returns:
        The head in eval mode and its settings. MSN's head becomes a ``DINOHead`` with BatchNorm and
        ``normalization="l2"``. For ``patch`` its ``teacher_temperature`` is that of the patches.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is unreadable or has no head that is a DINO head.

    Example:
        >>> import argparse, tempfile
        >>> from timm.models import VisionTransformer
        >>> vit = VisionTransformer(embed_dim=192, depth=1, num_heads=3, num_classes=0)
        >>> state = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
        >>> state |= {f"head.{name}": value for name, value in DINOHead(192, 32, 8, 16).state_dict().items()}
        >>> content = {"student": state, "teacher": state, "epoch": 0}
        >>> content["args"] = argparse.Namespace(arch="vit_tiny", norm_last_layer=False, teacher_temp=0.06)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(content, f"{folder}/checkpoint.pth")
        ...     head, settings = load_head(f"{folder}/checkpoint.pth")
        >>> head.last_layer.num_prototypes, settings.normalization, settings.teacher_temperature
        (16, 'none', 0.06)
    """
    return head_from(with_head(read_weights(path, which)), tokens)
