"""``export --push-to``: calls of huggingface_hub's own API class are recorded; its errors are its own."""

from __future__ import annotations

import inspect
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from dinovmf_plugin._version import __version__
from dinovmf_plugin.publishing.cli import export_main


@pytest.fixture
def calls(monkeypatch):
    """Calls of the real signatures: an argument that the library does not have fails here, too."""
    seen = []

    def recorder(name, result):
        signature = inspect.signature(getattr(HfApi, name))

        def call(self, **kwargs):
            signature.bind(self, **kwargs)
            if name == "upload_folder":
                kwargs["uploaded"] = sorted(
                    path.name
                    for path in huggingface_hub.utils.filter_repo_objects(
                        list(Path(kwargs["folder_path"]).iterdir()),
                        allow_patterns=kwargs["allow_patterns"],
                        key=lambda path: path.name,
                    )
                )
            seen.append((name, kwargs))
            return result

        return call

    address = "https://huggingface.co/somebody/dino"
    monkeypatch.setattr(HfApi, "create_repo", recorder("create_repo", address))
    monkeypatch.setattr(HfApi, "upload_folder", recorder("upload_folder", None))
    return seen


def _fails(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        export_main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_push__creates_the_repository_and_uploads_what_was_written(
    stored_run, tmp_path, calls, capsys
):
    run, folder = stored_run(), tmp_path / "e"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine, not theirs")
    assert export_main([str(run.path), "--output", str(folder), "--push-to", "somebody/dino"]) == 0
    (created, repository), (uploaded, upload) = calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert repository == {
        "repo_id": "somebody/dino",
        "repo_type": "model",
        "private": False,
        "exist_ok": False,
    }
    assert (upload["repo_id"], upload["folder_path"]) == ("somebody/dino", folder)
    assert __version__ in upload["commit_message"]
    names = sorted(path.name for path in folder.iterdir())
    assert upload["uploaded"] == [name for name in names if name != "notes.txt"]
    assert len(upload["uploaded"]) == 5
    assert "uploaded to https://huggingface.co/somebody/dino" in capsys.readouterr().out


def test_private_and_overwrite__reach_the_hub(stored_run, tmp_path, calls):
    run = stored_run()
    arguments = [str(run.path), "--output", str(tmp_path / "e"), "--push-to", "me/x"]
    assert export_main([*arguments, "--private", "--overwrite"]) == 0
    assert (calls[0][1]["private"], calls[0][1]["exist_ok"]) == (True, True)


def test_offline__is_one_sentence_and_the_folder_is_complete(
    stored_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    run = stored_run()
    error = _fails(capsys, run.path, "--output", tmp_path / "e", "--push-to", "me/x")
    assert "HF_HUB_OFFLINE is set" in error
    assert f"`hf upload me/x {tmp_path / 'e'}`" in error
    assert (tmp_path / "e" / "model.safetensors").is_file()


def test_no_network__is_one_sentence(stored_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(
        HfApi, "create_repo", _raises(ConnectionError("Name resolution failed\n\nx"))
    )
    error = _fails(capsys, stored_run().path, "--output", tmp_path / "e", "--push-to", "me/x")
    assert "the Hub cannot be reached (Name resolution failed)" in error


def _raises(error):
    def call(self, **kwargs):
        raise error

    return call


class _Response:
    """As much of a transport's response as the error needs."""

    request = None
    headers: dict = {}

    def __init__(self, status):
        self.status_code = status


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (409, "the repository exists already: choose another name, or add --overwrite"),
        (401, "run `hf auth login`, or set HF_TOKEN"),
        (500, "Internal"),
    ],
)
def test_refusals_of_the_hub__are_one_sentence(
    stored_run, tmp_path, monkeypatch, capsys, status, told
):
    error = HfHubHTTPError("Internal trouble\nRequest ID: 1", response=_Response(status))
    monkeypatch.setattr(HfApi, "create_repo", _raises(error))
    assert told in _fails(
        capsys, stored_run().path, "--output", tmp_path / "e", "--push-to", "me/x"
    )


def test_bad_names__before_any_work(stored_run, tmp_path, calls, capsys):
    run = stored_run()
    error = _fails(capsys, run.path, "--output", tmp_path / "e", "--push-to", "a/b/c")
    assert "--push-to a/b/c is no repository of the Hub" in error
    assert "--private is about" in _fails(capsys, run.path, "--output", tmp_path / "e", "--private")
    assert not calls
    assert not (tmp_path / "e").exists()
