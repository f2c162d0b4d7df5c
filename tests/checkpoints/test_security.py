"""Foreign files never run code; broken ones end in one sentence; outputs stay where they belong."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch

from dinovmf_plugin.checkpoints import load_backbone
from dinovmf_plugin.checkpoints.reading import read_file
from dinovmf_plugin.checkpoints.transfer import export_weights, import_weights
from dinovmf_plugin.checkpoints.writing import check_free, inside


class Evil:
    """Unpickling this creates the file ``marker``: proof that code ran."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class EvilState:
    """Tries to run code through the state of an allowed class."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return argparse.Namespace, (), {"x": Evil(self.marker)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [Evil, EvilState])
def test_pickled_code_is_refused_and_not_run(original, tmp_path, kind, zipped):
    marker = tmp_path / "ran"
    content = {"state_dict": original.ViT().state_dict(), "args": kind(marker)}
    path = tmp_path / "evil.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"evil\.pth was refused: it holds pickled objects"
    ) as caught:
        load_backbone(path, num_heads=2)
    assert not marker.exists()
    if zipped:
        assert "posix.mkdir" in str(caught.value)
        assert "Namespace" not in str(caught.value)
    torch.load(path, weights_only=False)  # control: the file really would have done it
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read_file(path)
    assert not marker.exists()


def test_namespace_and_numpy_numbers_of_official_files_are_read(original, tmp_path):
    _, content = original.pair("dino")
    torch.save(content, tmp_path / "full.pth")
    read = read_file(tmp_path / "full.pth")
    assert read["args"].teacher_temp == 0.05
    assert read["optimizer"]["param_groups"][0]["lr"] == 5e-4


def damaged(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404 not found</html>")
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is truncated: the end of the archive is missing"),
        ("empty", "is empty"),
        ("text", "is not a readable PyTorch checkpoint"),
    ],
)
def test_damaged_torch_files(original, tmp_path, how, message):
    path = tmp_path / "broken.pth"
    torch.save(original.ViT().state_dict(), path)
    damaged(path, how)
    with pytest.raises(ValueError, match=rf"broken\.pth {message}") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_damaged_safetensors(plugin_checkpoint, tmp_path, how):
    torch.save(plugin_checkpoint[2], tmp_path / "a.ckpt")
    export_weights(tmp_path / "a.ckpt", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    damaged(path, how)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_backbone(path)


def test_wrong_paths_and_contents(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load_backbone(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"a folder without model\.safetensors"):
        load_backbone(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, but a dictionary"):
        load_backbone(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "foreign.pth", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(ValueError, match=r"foreign\.pth is not a readable PyTorch checkpoint"):
        load_backbone(tmp_path / "foreign.pth")


def test_outputs_stay_inside_their_folder(plugin_checkpoint, tmp_path):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="outside the output folder"):
            inside(folder, name)
    assert inside(folder, "a/x") == folder / "a" / "x"
    (folder / "model.safetensors").symlink_to(outside)
    torch.save(plugin_checkpoint[2], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"model\.safetensors would be written outside"):
        export_weights(tmp_path / "a.ckpt", folder, overwrite=True)
    assert not outside.exists()


def test_nothing_is_overwritten_unasked_and_before_any_work(tmp_path):
    """The input does not exist: outputs are checked first."""
    (tmp_path / "x.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match=r"x\.safetensors exists already.*--overwrite"):
        import_weights(tmp_path / "absent", tmp_path / "x.safetensors", source="dino")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_text("precious")
    with pytest.raises(FileExistsError, match=r"README\.md exists already"):
        export_weights(tmp_path / "absent", tmp_path / "d")
    with pytest.raises(NotADirectoryError, match="is a file, but a folder is needed"):
        export_weights(tmp_path / "absent", tmp_path / "x.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_free([tmp_path / "d"], overwrite=True)
    assert (tmp_path / "x.safetensors").read_text() == "precious"


def test_a_foreign_config_json_is_never_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"my": "settings"}')
    with pytest.raises(FileExistsError, match=r"config\.json exists and is no model configuration"):
        import_weights(
            tmp_path / "absent", tmp_path / "x.safetensors", source="dino", overwrite=True
        )
    assert (tmp_path / "config.json").read_text() == '{"my": "settings"}'
