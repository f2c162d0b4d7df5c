"""The model card of an exported backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import yaml
from torch import Tensor

from dinovmf_plugin.checkpoints.architecture import ViTShape
from dinovmf_plugin.checkpoints.named import NamedShape
from dinovmf_plugin.report.numbers import shown
from dinovmf_plugin.report.tables import Table

__all__ = ["PAPER", "UNKNOWN_LICENSE", "Measured", "model_card"]

PAPER = "https://arxiv.org/abs/2405.10939"
UNKNOWN_LICENSE = "unknown"
"""The Hub's word for weights whose license nobody has stated."""


@dataclass(frozen=True)
class Measured:
    """Scores of the exported network.

    Attributes:
        table: what was measured.
        source: where the numbers come from, in words.
    """

    table: Table
    source: str


_USE = """\
## Use

```python
import timm

# from this folder (timm 1.0.16 or newer)
model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()

# or from the weights alone
model = timm.create_model(
    "{architecture}", pretrained=False, num_classes=0{arguments},
    checkpoint_path="FOLDER/model.safetensors",
).eval()

# timm's own defaults for this name may be other statistics: give the ones of this training
transform = timm.data.create_transform(
    input_size={input_size}, interpolation="bicubic", crop_pct={crop_pct},
    mean={mean}, std={std},
)
features = model(transform(image).unsqueeze(0))  # (1, {width})
```
"""

_SIZES = """\
Other image sizes: `timm.create_model(..., img_size=...)` resamples the position embeddings with
antialiasing; official DINO, and `dinovmf export --img-size`, do without.
"""

_MIXTURE = """\
## Mixture

`model.mixture.safetensors` holds {count:,} components in {dim} dimensions at the teacher's temperature
{temperature:g}, for unit vectors `y` of the head (`model.head.safetensors`, read by
`dinovmf_plugin.checkpoints.load_head`):

    logits = prototypes @ y / temperature + log_normalizer        kappa = ||prototypes|| / temperature

| concentration | 5 % | median | 95 % |
|:--|--:|--:|--:|
| kappa | {low} | {median} | {high} |
"""

# key of the recipe -> words
_MAIN = {
    "method": "Method",
    "backbone.name": "Backbone",
    "data.dataset": "Data",
    "max_epochs": "Epochs, as planned",
    "optimizer.name": "Optimizer",
    "optimizer.batch_size": "Images per device and step",
    "devices": "Devices",
    "num_nodes": "Machines",
    "optimizer.lr": "Learning rate",
    "optimizer.weight_decay": "Weight decay",
    "precision": "Precision",
    "seed": "Seed",
}
_OF_HEAD = ("method", "normalization", "centering", "student_temperature", "teacher_temperature")


def _default_arguments(shape: ViTShape | NamedShape) -> dict[str, Any]:
    """What timm's entry point of this name builds without further arguments."""
    if isinstance(shape, NamedShape):
        return {}
    with torch.device("meta"):
        model: Any = timm.create_model(shape.architecture, pretrained=False, num_classes=0)
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": 3,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
    }


def _facts(rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _front(license_name: str, own: Mapping[str, Any]) -> str:
    head = own.get("head") or {}
    tags = ["timm", "image-feature-extraction", "self-supervised-learning", "dinovmf_plugin"]
    tags += [str(head["method"])] if "method" in head else []
    tags += [f"arxiv:{PAPER.rsplit('/', 1)[1]}"]
    data = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"}
    return f"---\n{_yaml({**data, 'license': license_name, 'tags': tags})}---\n"


def _what(shape: ViTShape | NamedShape, own: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    feature = "pooled" if isinstance(shape, NamedShape) else "CLS"
    head = own.get("head") or {}
    height, width = data["input_size"][1:]
    facts: dict[str, object] = {
        "Architecture": shape,
        "Images": f"{height} x {width} pixels, bicubic resize, center crop of {data['crop_pct']:.1%}",
        "Channel mean": tuple(data["mean"]),
        "Channel deviation": tuple(data["std"]),
        **{name.replace("_", " ").capitalize(): head.get(name) for name in _OF_HEAD},
    }
    return (
        f"# Self-supervised {shape.name}\n\n"
        f"{str(own['which']).capitalize()} backbone of a {own['source']} checkpoint (`{own['file']}`), "
        f"exported by dinovmf_plugin {own['version']}.\n"
        f"It has no classifier: its output is the {feature} feature of {shape.embed_dim} numbers.\n\n"
        f"{_facts(facts)}"
    )


def _training(own: Mapping[str, Any]) -> str:
    told = own.get("training") or {}
    recipe = told.get("recipe") or {}
    if not told:
        return "## Training\n\nThe file does not tell how its weights were trained.\n"
    rows: dict[str, object] = {"Steps of the optimizer": told.get("steps")}
    rows |= {words: _at(recipe, key) for key, words in _MAIN.items()}
    text = (
        f"## Training\n\nSelf-distillation without labels; the method's mathematics: {PAPER}.\n\n"
    )
    text += _facts(rows)
    if recipe:
        keys = f"```yaml\n{_yaml(recipe)}```"
        text += (
            f"\n<details><summary>Every key that the file tells</summary>\n\n{keys}\n\n</details>\n"
        )
    return text


def _mixture(tensors: Mapping[str, Tensor]) -> str:
    count, dim = tensors["prototypes"].shape
    levels = torch.quantile(tensors["kappa"], torch.tensor([0.05, 0.5, 0.95])).tolist()
    low, median, high = (shown(level) for level in levels)
    temperature = float(tensors["temperature"])
    return _MIXTURE.format(
        count=count, dim=dim, temperature=temperature, low=low, median=median, high=high
    )


def _scores(measured: Sequence[Measured]) -> str:
    if not measured:
        return (
            "## Measured\n\nNo evaluation of this network lay beside its file: evaluate it on your own "
            "data.\n"
        )
    parts = [f"{one.table.markdown()}\n\n{one.source}\n" for one in measured]
    return "\n".join(["## Measured\n", *parts])


def _license(name: str) -> str:
    stated = "is not stated" if name == UNKNOWN_LICENSE else f"is {name}, as its exporter says"
    return (
        f"## License\n\nThe license of these weights {stated}. Weights keep the terms under which they, and "
        "the images that they were trained on, were published.\n"
    )


def model_card(
    shape: ViTShape | NamedShape,
    config: Mapping[str, Any],
    *,
    mixture: Mapping[str, Tensor] | None = None,
    measured: Sequence[Measured] = (),
    license_name: str = UNKNOWN_LICENSE,
) -> str:
    """Markdown for ``README.md``: what the weights are, how they came about, and the lines that load them.

    Args:
        shape: architecture.
        config: content of ``config.json``.
        mixture: tensors of ``mixture_tensors``, where they are exported.
        measured: scores of this very network.
        license_name: the Hub's identifier of a license.
    """
    own, data = config["dinovmf_plugin"], config["pretrained_cfg"]
    defaults = _default_arguments(shape)
    special = {k: v for k, v in config["model_args"].items() if defaults.get(k, object()) != v}
    use = _USE.format(
        width=shape.embed_dim,
        crop_pct=data["crop_pct"],
        input_size=tuple(data["input_size"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        architecture=shape.architecture,
        arguments="".join(f", {k}={v!r}" for k, v in special.items()),
    )
    parts = [
        _front(license_name, own),
        _what(shape, own, data),
        use,
        "" if isinstance(shape, NamedShape) else _SIZES,
        _training(own),
        "" if mixture is None else _mixture(mixture),
        _scores(measured),
        _license(license_name),
    ]
    return "\n".join(part for part in parts if part)
