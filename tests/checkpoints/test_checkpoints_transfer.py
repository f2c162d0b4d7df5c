"""Import, export, and going on from imported weights."""

import json
import re

import pytest
import safetensors
import timm
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.checkpoints import graphs, initialize_from, load_backbone, load_head
from dinovmf_plugin.checkpoints.cli import export_main, import_main
from dinovmf_plugin.heads import DINOHead

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def save(folder, content, name="file.pth"):
    path = folder / name
    torch.save(content, path)
    return path


@pytest.fixture
def ckpt(plugin_checkpoint, tmp_path):
    return save(tmp_path, plugin_checkpoint[2], "last.ckpt")


@pytest.mark.parametrize("kind", ["dino", "ibot", "msn"])
@pytest.mark.parametrize("which", ["teacher", "student"])
@torch.no_grad()
def test_import_export_round_trip_to_timm(original, images, tmp_path, capsys, kind, which):
    nets, content = original.msn() if kind == "msn" else original.pair(kind)
    path, out, folder = save(tmp_path, content), tmp_path / "i" / "w.safetensors", tmp_path / "e"
    command = [str(path), "--source", kind, "--output", str(out), "--num-heads", "2"]
    assert import_main([*command, "--which", which]) == 0
    printed = capsys.readouterr().out
    assert f"{which} of a {kind} file" in printed
    assert "(100.0%)" in printed
    assert printed.count("wrote ") == 3
    assert str(out) in printed
    assert export_main([str(out), "--output", str(folder), "--head"]) == 0

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
    assert export_main([str(path), "--output", str(tmp_path / "e")]) == 0
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
    assert export_main([str(ckpt), "--output", str(folder), "--img-size", "48", "--head"]) == 0
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
    command = [str(ckpt), "--output", str(folder), "--torchscript", "--onnx"]
    assert export_main(command) == 0
    vit, _ = load_backbone(ckpt)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    traced = torch.jit.load(folder / "model.torchscript.pt")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(traced(images), vit(images), **TOLERANCE)
        features = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        torch.testing.assert_close(features, vit(images), **TOLERANCE)
    names = ["README.md", "config.json", "model.onnx", "model.safetensors", "model.torchscript.pt"]
    assert sorted(p.name for p in folder.iterdir()) == names


@torch.no_grad()
def test_a_graph_with_other_outputs_is_not_written(ckpt, tmp_path):
    vit, _ = load_backbone(ckpt)
    vit.train()
    vit.blocks[0].attn.proj_drop.p = 0.5  # a network that never gives the same twice
    with pytest.raises(
        RuntimeError, match="TorchScript file differs from the network by .* not written"
    ):
        graphs.write_torchscript(vit, tmp_path / "e" / "m.pt")
    assert list((tmp_path / "e").iterdir()) == []


def test_absent_onnx_packages_are_named_before_any_work(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    assert export_main([str(ckpt), "--output", str(tmp_path / "e"), "--onnx"]) == 1
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
            code = import_main(
                ["--source", source, str(path), "--output", str(out), "--num-heads", "2"]
            )
            error = capsys.readouterr().err
            assert (code == 0) == out.exists() == (source in fits[name]), (name, source, error)
            if code:
                assert f"is no {source} checkpoint: it has" in error
                assert error.count("\n") == 1


def test_bad_commands_end_in_one_line(ckpt, tmp_path, capsys):
    def fails(verb, *arguments):
        assert verb([str(a) for a in arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "Traceback" not in error
        return error

    base = (ckpt, "--source", "solo", "--output")
    assert "must be a file name that ends in .safetensors" in fails(
        import_main, *base, tmp_path / "x.pth"
    )
    assert "there is no checkpoint file" in fails(export_main, "absent", "--output", tmp_path / "e")
    bare = tmp_path / "i" / "w.safetensors"
    assert import_main([*map(str, base), str(bare)]) == 0
    capsys.readouterr()
    assert "exists already" in fails(import_main, *base, bare)
    assert import_main([*map(str, base), str(bare), "--overwrite"]) == 0
    with pytest.raises(SystemExit):
        import_main([str(ckpt), "--source", "clip", "--output", "x.safetensors"])
    assert "invalid choice: 'clip'" in capsys.readouterr().err


def test_export_head_of_a_backbone_only_file_is_an_error(original, tmp_path, capsys):
    path = save(tmp_path, original.ViT().state_dict())
    command = [str(path), "--output", str(tmp_path / "e"), "--num-heads", "2", "--head"]
    assert export_main(command) == 1
    assert "holds no projection head" in capsys.readouterr().err


# --- continue pre-training -------------------------------------------------------------------


def small_vit(**kwargs):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    return VisionTransformer(**sizes | kwargs, num_classes=0)


def small_head(k=24):
    return DINOHead(32, hidden_dim=40, bottleneck_dim=16, num_prototypes=k, normalization="vmf")


@pytest.mark.parametrize("which", ["teacher", "student"])
@torch.no_grad()
def test_initialize_from_official_weights(original, images, tmp_path, which):
    nets, content = original.pair("dino")
    path = save(tmp_path, content)
    vit, head = small_vit(drop_path_rate=0.1), small_head()
    report = initialize_from(vit, head, path, which)
    torch.testing.assert_close(vit.eval()(images), nets[which][0](images), **TOLERANCE)
    features = torch.randn(4, 32)
    scores = head.last_layer.scores(head(features))
    torch.testing.assert_close(scores, nets[which][1](features), **TOLERANCE)
    assert len(report.head_matched) == 8
    assert report.head_skipped == ()
    assert "head        8 tensors matched" in str(report)


@torch.no_grad()
def test_initialize_from_keeps_new_prototypes_and_resamples(original, tmp_path):
    nets, content = original.pair("dino")
    path = save(tmp_path, content)
    vit, head = small_vit(img_size=48), small_head(k=30)
    before = head.last_layer.weight_v.clone()
    report = initialize_from(vit, head, path)
    larger = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(vit.eval()(larger), nets["teacher"][0](larger), **TOLERANCE)
    assert report.resized == ((4, 4), (6, 6))
    torch.testing.assert_close(head.mlp[0].weight, nets["teacher"][1].mlp[0].weight)
    torch.testing.assert_close(head.last_layer.weight_v, before, rtol=0, atol=0)
    assert len(report.head_matched) == 6
    assert "last_layer.weight_v (file (24, 16), network (30, 16))" in report.head_skipped


def test_initialize_from_backbone_only_file_names_the_missing_head(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    report = initialize_from(small_vit(), small_head(), path)
    assert report.head_matched == ()
    assert "mlp.0.weight (not in the file)" in report.head_skipped
    assert initialize_from(small_vit(), None, path).head_skipped == ()


def test_initialize_from_refuses_other_networks(original, tmp_path):
    path = save(tmp_path, original.ViT().state_dict())
    vit = small_vit(embed_dim=64)
    before = vit.pos_embed.detach().clone()
    with pytest.raises(ValueError, match=r"was refused: only .* of the backbone's tensors match"):
        initialize_from(vit, None, path)
    torch.testing.assert_close(vit.pos_embed.data, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot fill a Linear"):
        initialize_from(torch.nn.Linear(2, 2), None, path)
