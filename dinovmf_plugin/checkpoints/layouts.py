"""Which project wrote a weight file, and where its backbone and head are in it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor

from dinovmf_plugin.checkpoints.reading import read_file, resolve_file
from dinovmf_plugin.core.vit import PositionResampling

__all__ = ["Source", "StoredWeights", "Which", "read_weights"]

Which = Literal["teacher", "student"]
Source = Literal["dinovmf_plugin", "solo", "dino", "ibot", "msn", "dinov2", "timm"]


@dataclass(frozen=True)
class StoredWeights:
    """Weights of one network as found in a file, under timm's names.

    Attributes:
        path: the file.
        source: the layout that was recognized; ``timm`` is a bare ViT state dict, which is also what
            DINO, iBOT and MSN publish as backbone-only files.
        which: ``teacher`` or ``student``; ``unnamed`` if the file holds one nameless network.
        backbone: tensors of the Vision Transformer.
        head: tensors of the projection head: ``mlp.*``, ``last_layer.*``; for patches ``last_layer2.*``
            (iBOT, on the same MLP), or a whole head below ``patch.`` (this project, DINOv2).
        config: settings stored with the weights (resolved config, ``args``, or ``config.json``).
        mask_token: what iBOT's student puts in the place of masked patches, ``(1, 1, D)``.
        center: the teacher's stored center for CLS, ``(K,)`` float32, where the file has one.
        steps: of the optimizer before the weights were stored, where the file tells.
    """

    path: Path
    source: Source
    which: str
    backbone: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mask_token: Tensor | None = None
    center: Tensor | None = None
    steps: int | None = None

    @property
    def position_resampling(self) -> PositionResampling:
        """The rule by which the method that wrote the weights resamples position embeddings."""
        own = self.config.get("dinovmf_plugin")
        if isinstance(own, Mapping) and "position_resampling" in own:
            rule = own["position_resampling"]
            return (
                cast(PositionResampling, rule) if rule in get_args(PositionResampling) else "dino"
            )
        if self.source == "dinov2" and "reg_token" in self.backbone:
            return "antialias"
        method = str(self.config.get("method", ""))
        ours = self.source == "dinovmf_plugin" and method.startswith("msn")
        return "msn" if ours or self.source == "msn" else "dino"


def _tensors(mapping: Any) -> dict[str, Tensor]:
    """Tensors of a state dict without the parts that DDP and torch.compile put into the names."""
    wrappers = {"module", "_orig_mod"}
    return {
        ".".join(part for part in name.split(".") if part not in wrappers): value
        for name, value in mapping.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _below(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    for prefix in prefixes:
        found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            return found
    return {}


def _center(section: Any, key: str) -> Tensor | None:
    value = section.get(key) if isinstance(section, Mapping) else None
    return value.float().reshape(-1) if isinstance(value, Tensor) else None


def _backbone_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for the few tensors that iBOT (layer scale) and DINOv2 call otherwise.

    DINOv2: SwiGLU's ``w12`` and ``w3``, ``register_tokens``, and blocks in chunks (``blocks.0.7.`` is the
    seventh). Its registers have no position embeddings and come after those are added, so that CLS takes its
    own embedding into the token, as in timm: ``no_embed_class``.
    """
    renamed = {}
    for name, value in tensors.items():
        name = name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        renamed[name] = value
    if "register_tokens" in renamed and {"cls_token", "pos_embed"} <= renamed.keys():
        pos = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + pos[:, :1]
        renamed["pos_embed"] = pos[:, 1:]
    return renamed


def _is_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether raw backbone tensors have names or shapes that DINOv2 alone writes."""
    token = tensors.get("mask_token")
    return (
        "register_tokens" in tensors
        or any(".mlp.w12." in name for name in tensors)
        or (token is not None and token.ndim == 2 and "blocks.0.ls1.gamma" in tensors)
        or any(re.match(r"blocks\.\d+\.\d+\.", name) for name in tensors)
    )


def _told_by_dinov2(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with what the conversion of ``register_tokens`` has made of the position embeddings."""
    if "register_tokens" not in tensors:
        return dict(config)
    own = config.get("model_args")
    told = dict(own) if isinstance(own, Mapping) else {}
    return {**config, "model_args": {**told, "no_embed_class": True}}


def _head_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of ``DINOHead``: old and new weight norm alike, one-layer MLPs, no stale products."""
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        if name in ("mlp.weight", "mlp.bias"):
            name = name.replace("mlp.", "mlp.0.")
        renamed[name] = value
    # weight norm's hook stores g v / ||v|| as `.weight` in some files: computed, and stale after EMA
    for layer in ("last_layer", "last_layer2"):
        if f"{layer}.weight_v" in renamed:
            renamed.pop(f"{layer}.weight", None)
    return renamed


def _with_patch_head(head: Mapping[str, Tensor], patch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**head, **{f"patch.{name}": value for name, value in _head_names(patch).items()}}


def _msn_head(tensors: Mapping[str, Tensor], prototypes: Any) -> dict[str, Tensor]:
    """MSN's ``fc.fc1, bn1, fc2, bn2, fc3`` and its bare prototype matrix as a ``DINOHead``."""
    has_bn = any(name.startswith("bn") for name in tensors)
    stride = 3 if has_bn else 2
    index = {"fc1": 0, "bn1": 1, "fc2": stride, "bn2": stride + 1, "fc3": 2 * stride}
    head = {}
    for name, value in tensors.items():
        layer, _, rest = name.partition(".")
        if layer in index:
            head[f"mlp.{index[layer]}.{rest}"] = value
    if head and isinstance(prototypes, Tensor):
        head["last_layer.weight_v"] = prototypes
        head["last_layer.weight_g"] = prototypes.new_ones(len(prototypes), 1)
    return head


def _args_beside(path: Path) -> dict[str, Any]:
    """``args.json`` that solo-learn writes into the folder of its checkpoints."""
    beside = path.parent / "args.json"
    if not beside.is_file():
        return {}
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{beside} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _is_lightning(content: Mapping[str, Any]) -> bool:
    state = content.get("state_dict")
    return isinstance(state, Mapping) and (
        "pytorch-lightning_version" in content
        or "dinovmf_plugin" in content
        or any(str(name).startswith(("momentum_", "classifier.")) for name in state)
    )


def _lightning(path: Path, content: dict[str, Any], which: Which) -> StoredWeights:
    tensors = _tensors(content["state_dict"])
    own = content.get("dinovmf_plugin")
    config = dict(own.get("cfg") or {}) if isinstance(own, dict) else {}
    config = config or _args_beside(path)
    teacher = which == "teacher"
    backbone = _below(
        tensors,
        *(("momentum_backbone.", "momentum_encoder.") if teacher else ("backbone.", "encoder.")),
    )
    if not backbone:
        raise ValueError(f"{path} holds no {which} backbone{_instead(tensors, teacher)}")
    head = _head_names(_below(tensors, "momentum_head." if teacher else "head."))
    if head and "last_layer.weight_v" not in head:  # MSN: one set of prototypes for both networks
        head |= {f"last_layer.{k}": v for k, v in _below(tensors, "prototypes.").items()}
    head = _with_patch_head(
        head, _below(tensors, "momentum_patch_head." if teacher else "patch_head.")
    )
    source: Source = "dinovmf_plugin" if isinstance(own, dict) else "solo"
    mask_token = None if teacher else tensors.get("mask_token")
    names = _backbone_names(backbone)
    center = _center(tensors, "centering.center")
    told = content.get("global_step")
    steps = told if isinstance(told, int) and told > 0 else None
    return StoredWeights(path, source, which, names, head, config, mask_token, center, steps)


def _instead(tensors: Mapping[str, Tensor], teacher: bool) -> str:
    """What to try with a Lightning checkpoint that has no such network."""
    names = ("backbone.", "encoder.") if teacher else ("momentum_backbone.", "momentum_encoder.")
    if {"cls_token", "pos_embed"} <= set(_below(tensors, *names)):
        return f": try which={'student' if teacher else 'teacher'!r}"
    parts = ", ".join(list(dict.fromkeys(name.split(".")[0] for name in tensors))[:6])
    return (
        f" under solo-learn's names (backbone.*, momentum_backbone.*); its parts are {parts or 'none'}: "
        "save the state dict of the Vision Transformer alone, under timm's names, and use that"
    )


def _student_teacher(path: Path, content: dict[str, Any], which: Which) -> StoredWeights:
    if not isinstance(content.get(which), Mapping):
        raise ValueError(
            f"{path} holds no {which} weights; its keys are {', '.join(map(str, content))}"
        )
    tensors = _tensors(content[which])
    networks = [content[k] for k in ("student", "teacher") if isinstance(content.get(k), Mapping)]
    ibot = "ibot_loss" in content or any(
        "last_layer2" in name or name.endswith("masked_embed") for net in networks for name in net
    )
    args = content.get("args")
    raw = _below(tensors, "backbone.")
    backbone = _backbone_names(raw)
    masked = backbone.get("masked_embed", backbone.get("mask_token"))
    source: Source = "dinov2" if _is_dinov2(raw) else "ibot" if ibot else "dino"
    told = dict(vars(args)) if isinstance(args, argparse.Namespace) else {}
    return StoredWeights(
        path,
        source,
        which,
        backbone,
        _with_patch_head(
            _head_names(_below(tensors, "head.", "dino_head.")), _below(tensors, "ibot_head.")
        ),
        _told_by_dinov2(raw, told),
        None if masked is None else masked.reshape(1, 1, -1),
        _center(content.get("ibot_loss" if ibot else "dino_loss"), "center"),
    )


def _msn(path: Path, content: dict[str, Any], which: Which) -> StoredWeights:
    key = "target_encoder" if which == "teacher" else "encoder"
    if not isinstance(content.get(key), Mapping):
        raise ValueError(f"{path} holds no {key}, MSN's name for the {which}")
    tensors = _tensors(content[key])
    return StoredWeights(
        path,
        "msn",
        which,
        _backbone_names({k: v for k, v in tensors.items() if not k.startswith(("fc.", "pred."))}),
        _msn_head(_below(tensors, "fc."), content.get("prototypes")),
        {k: content[k] for k in ("temperature",) if k in content},
    )


def _bare(path: Path, content: dict[str, Any]) -> StoredWeights:
    config = content.get("config")
    state = content.get("state_dict", content.get("model", content))
    tensors = _tensors(state if isinstance(state, Mapping) else {})
    head = {k: v for k, v in _below(tensors, "head.").items() if k.startswith(("mlp", "last_"))}
    backbone = _below(tensors, "backbone.") or {
        k: v for k, v in tensors.items() if k.removeprefix("head.") not in head
    }
    config = config if isinstance(config, dict) else {}
    own = config.get("dinovmf_plugin")
    which = str(own.get("which", "unnamed")) if isinstance(own, Mapping) else "unnamed"
    names = _backbone_names(backbone)
    if not _is_dinov2(backbone):
        return StoredWeights(path, "timm", which, names, _head_names(head), config)
    token = names.get("mask_token")
    return StoredWeights(
        path,
        "dinov2",
        which,
        names,
        _head_names(head),
        _told_by_dinov2(backbone, config),
        None if token is None else token.reshape(1, 1, -1),
    )


def read_weights(path: str | Path, which: Which = "teacher") -> StoredWeights:
    """Read a file of any known layout and pick the teacher or the student.

    Args:
        path: official DINO, iBOT or MSN checkpoint, solo-learn or plugin ``.ckpt``, a bare ViT state
            dict, a ``.safetensors`` file, or an exported folder.
        which: ``teacher`` (EMA network, the one that the papers evaluate) or ``student``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is unreadable (see ``read_file``), holds no such network, or
            ``which`` is unknown.
    """
    if which not in get_args(Which):
        raise ValueError(f"which={which!r} is unknown: choose 'teacher' or 'student'")
    path = resolve_file(path)
    content = read_file(path)
    if _is_lightning(content):
        return _lightning(path, content, which)
    if isinstance(content.get("student"), Mapping) or isinstance(content.get("teacher"), Mapping):
        return _student_teacher(path, content, which)
    if isinstance(content.get("target_encoder"), Mapping) or (
        isinstance(content.get("encoder"), Mapping) and "prototypes" in content
    ):
        return _msn(path, content, which)
    return _bare(path, content)
