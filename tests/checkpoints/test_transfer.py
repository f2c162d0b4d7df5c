"""Import, export, and going on from imported weights."""

import json
import re

import pytest
import safetensors
import timm
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.__main__ import main
from dinovmf_plugin.checkpoints import graphs, load_backbone, load_head

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def save(folder, content, name="file.pth"):
    path = folder / name
    torch.save(content, path)
    return path


def command(*arguments):
    """Exit status of ``python -m dinovmf_plugin ARGUMENTS``."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


@pytest.fixture
def ckpt(plugin_checkpoint, tmp_path):
    return save(tmp_path, plugin_checkpoint[2], "last.ckpt")


@pytest.mark.parametrize("kind", ["dino", "ibot", "msn"])
@pytest.mark.parametrize("which", ["teacher", "student"])
@torch.no_grad()
def test_import_export_round_trip_to_timm(original, images, tmp_path, capsys, kind, which):
    nets, content = original.msn() if kind == "msn" else original.pair(kind)
    path, out, folder = save(tmp_path, content), tmp_path / "i" / "w.safetensors", tmp_path / "e"
    options = ("--source", kind, "--output", out, "--num-heads", 2, "--which", which)
    assert command("import", path, *options) == 0
    printed = capsys.readouterr().out
    assert f"{which} of a {kind} file" in printed
    assert "(100.0%)" in printed
    assert printed.count("wrote ") == 3
    assert str(out) in printed
    assert command("export", out, "--output", folder, "--head") == 0

    vit, _ = load_backbone(path, which=which, num_heads=2)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.num_classes == 0
    torch.testing.assert_close(model(images), vit(images), **TOLERANCE)
    again, report = load_backbone(folder)
    torch.testing.assert_close(again(images), vit(images), rtol=0, atol=0)
    assert report.which == which

    features = torch.randn(4, 32)
    for tokens in ("cls", "patch"):
        head, settings = load_head(path, which=which, tokens=tokens)
        for file in (out, folder):
            copy, copied = load_head(file, tokens=tokens)
            assert copied == settings
            torch.testing.assert_close(copy(features), head(features), rtol=0, atol=0)
            torch.testing.assert_close(
                copy.last_layer.weight_v, head.last_layer.weight_v, rtol=0, atol=0
            )
    own = json.loads((folder / "config.json").read_text())["dinovmf_plugin"]
    assert (own["source"], own["which"], own["file"]) == (kind, which, "file.pth")


@torch.no_grad()
def test_export_of_a_standard_size_needs_no_arguments(tmp_path, images):
    source = VisionTransformer(embed_dim=192, num_heads=3, num_classes=0)
    path = save(tmp_path, source.state_dict())
    assert command("export", path, "--output", tmp_path / "e") == 0
    model = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        num_classes=0,
        checkpoint_path=tmp_path / "e" / "model.safetensors",
    )
    large = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model.eval()(large), source.eval()(large), **TOLERANCE)


@torch.no_grad()
def test_model_card_code_runs_and_config_tells_the_preprocessing(ckpt, tmp_path, images):
    folder = tmp_path / "e"
    assert command("export", ckpt, "--output", folder, "--img-size", 48, "--head") == 0
    card = (folder / "README.md").read_text()
    assert "| Normalization | vmf |" in card
    assert "vit_tiny" not in card.split("## Use")[0]
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("FOLDER", str(folder))
    models = []
    real = timm.create_model

    def remember(*args, **kwargs):
        models.append(real(*args, **kwargs))
        return models[-1]

    from torchvision.transforms.functional import to_pil_image

    scope = {"image": to_pil_image(torch.rand(3, 60, 70))}
    try:
        timm.create_model = remember
        exec(code, scope)
    finally:
        timm.create_model = real
    vit, _ = load_backbone(ckpt, img_size=48)
    other = torch.randn(2, 3, 48, 48)
    assert len(models) == 2
    assert scope["features"].shape == (1, 32)
    for model in models:
        torch.testing.assert_close(model.eval()(other), vit(other), **TOLERANCE)
    config = json.loads((folder / "config.json").read_text())
    data = timm.data.resolve_model_data_config(models[0])
    assert data["mean"] == [0.1, 0.2, 0.3]
    assert data["std"] == [0.4, 0.5, 0.6]
    assert tuple(data["input_size"]) == (3, 48, 48)
    assert data["crop_pct"] == 0.875
    assert data["interpolation"] == "bicubic"
    assert config["num_features"] == 32
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == config


@torch.no_grad()
def test_graphs_give_the_networks_outputs(ckpt, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path / "e"
    assert command("export", ckpt, "--output", folder, "--torchscript", "--onnx") == 0
    vit, _ = load_backbone(ckpt)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    traced = torch.jit.load(folder / "model.torchscript.pt")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(traced(images), vit(images), **TOLERANCE)
        features = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        torch.testing.assert_close(features, vit(images), **TOLERANCE)
    names = {"README.md", "config.json", "model.onnx", "model.safetensors", "model.torchscript.pt"}
    names |= {"model.head.safetensors", "model.mixture.safetensors"}
    assert {p.name for p in folder.iterdir()} == names


@torch.no_grad()
def test_a_graph_with_other_outputs_is_not_written(ckpt, tmp_path):
    vit, _ = load_backbone(ckpt)
    vit.train()
    vit.blocks[0].attn.proj_drop.p = 0.5  # a network that never gives the same twice
    with pytest.raises(
        ValueError, match="TorchScript file differs from the network by .* not written"
    ):
        graphs.write_torchscript(vit, (3, *vit.patch_embed.img_size), tmp_path / "e" / "m.pt")
    assert list((tmp_path / "e").iterdir()) == []


def test_absent_onnx_packages_are_named_before_any_work(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    assert command("export", ckpt, "--output", tmp_path / "e", "--onnx") == 2
    message = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime: pip install 'dinovmf-plugin[export]'" in message
    assert not (tmp_path / "e").exists()


def test_import_checks_the_layout_it_was_promised(original, ckpt, tmp_path, capsys):
    files = {
        "dino": save(tmp_path, original.pair("dino")[1], "dino.pth"),
        "ibot": save(tmp_path, original.pair("ibot")[1], "ibot.pth"),
        "msn": save(tmp_path, original.msn()[1], "msn.pth"),
        "solo": ckpt,
        "bare": save(tmp_path, original.ViT().state_dict(), "bare.pth"),
    }
    fits = {name: {name} for name in files} | {"bare": {"dino", "ibot", "msn"}}
    for name, path in files.items():
        for source in ("dino", "ibot", "msn", "solo"):
            out = tmp_path / name / source / "w.safetensors"
            options = ("--source", source, "--output", out, "--num-heads", 2)
            code = command("import", path, *options)
            error = capsys.readouterr().err
            assert (code == 0) == out.exists() == (source in fits[name]), (name, source, error)
            if code:
                assert f"is no {source} checkpoint: it has" in error
                assert error.count("\n") == 1


def test_an_incomplete_backbone_is_not_written(original, tmp_path, capsys):
    state = original.ViT(depth=4).state_dict()
    del state["norm.bias"]
    path = save(tmp_path, state)
    assert command("export", path, "--output", tmp_path / "e", "--num-heads", 2) == 2
    assert "it lacks norm.bias" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_bad_commands_end_in_one_line(original, ckpt, tmp_path, capsys):
    def fails(*arguments):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        return error

    begin = ("import", ckpt, "--source", "solo", "--output")
    out = tmp_path / "i" / "w.safetensors"
    assert "must be a file name that ends in .safetensors" in fails(*begin, tmp_path / "x.pth")
    assert "no checkpoint file" in fails("export", "absent", "--output", tmp_path / "e")
    assert command(*begin, out) == 0
    capsys.readouterr()
    assert "exists already" in fails(*begin, out)
    assert command(*begin, out, "--overwrite", "--which", "student") == 0
    assert load_backbone(out)[1].which == "student"
    capsys.readouterr()
    bare = save(tmp_path, original.ViT().state_dict())
    options = ("--output", tmp_path / "e", "--num-heads", 2, "--head")
    assert "holds no projection head" in fails("export", bare, *options)
    assert command("import", ckpt, "--source", "clip", "--output", "x.safetensors") == 2
    assert "invalid choice: 'clip'" in capsys.readouterr().err
