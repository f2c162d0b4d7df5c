"""The model card of an exported backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch

from dinovmf_plugin.checkpoints.architecture import ViTShape
from dinovmf_plugin.checkpoints.named import NamedShape

__all__ = ["model_card"]

_CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- self-supervised-learning
---

# {title}

{which} backbone of a {source} checkpoint (`{file}`), exported by dinovmf_plugin {version}.
It has no classifier: its output is the {feature} feature of {width} numbers.

| | |
|---|---|
| Architecture | {shape} |
| Images | {height} x {image_width} pixels, bicubic resize, centre crop of {crop_pct:.1%} |
| Channel mean | {mean} |
| Channel deviation | {std} |
{head_rows}
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

{sizes}

## Licence and limits

Weights keep the licence under which they, and the images that they were trained on, were published.
Nothing here states how well the features work: evaluate them on your own data.
"""


_SIZES = (
    "Other image sizes: `timm.create_model(..., img_size=...)` resamples the position embeddings with\n"
    "antialiasing; official DINO, and `dinovmf_plugin export --img-size`, do without."
)


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


def model_card(shape: ViTShape | NamedShape, config: Mapping[str, Any]) -> str:
    """Markdown for ``README.md``: what the weights are, and the lines that load them.

    Args:
        shape: architecture.
        config: content of ``config.json``.
    """
    own, data = config["dinovmf_plugin"], config["pretrained_cfg"]
    defaults = _default_arguments(shape)
    special = {k: v for k, v in config["model_args"].items() if defaults.get(k, object()) != v}
    head = own.get("head")
    rows = (
        "".join(
            f"| {name.replace('_', ' ').capitalize()} | {head[name]} |\n"
            for name in (
                "method",
                "normalization",
                "centering",
                "student_temperature",
                "teacher_temperature",
            )
        )
        if head
        else ""
    )
    return _CARD.format(
        title=f"Self-supervised {shape.name}",
        which=str(own["which"]).capitalize(),
        source=own["source"],
        file=own["file"],
        version=own["version"],
        width=shape.embed_dim,
        feature="pooled" if isinstance(shape, NamedShape) else "CLS",
        sizes="" if isinstance(shape, NamedShape) else _SIZES,
        shape=shape,
        height=data["input_size"][1],
        image_width=data["input_size"][2],
        crop_pct=data["crop_pct"],
        input_size=tuple(data["input_size"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        head_rows=rows,
        architecture=shape.architecture,
        arguments="".join(f", {k}={v!r}" for k, v in special.items()),
    )
