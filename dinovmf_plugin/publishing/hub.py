"""An exported folder to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinovmf_plugin._version import __version__

__all__ = ["check_repository", "push"]


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "--push-to needs huggingface_hub: pip install 'dinovmf-plugin[export]'"
        ) from error
    return huggingface_hub


def check_repository(name: str) -> None:
    """Check the name and that the library is there, before any work.

    Raises:
        ImportError: without huggingface_hub.
        ValueError: for a name that the Hub does not take.

    Example:
        >>> check_repository("somebody/dino-vmf-vits16")
        >>> check_repository("some body/x")
        Traceback (most recent call last):
        ValueError: --push-to some body/x is no repository of the Hub: OWNER/NAME of letters, digits, ...
    """
    library = _library()
    try:
        library.utils.validate_repo_id(name)
    except library.errors.HFValidationError as error:
        raise ValueError(
            f"--push-to {name} is no repository of the Hub: OWNER/NAME of letters, digits, dashes, dots and "
            "underscores"
        ) from error


def _reason(error: Exception, library: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, library.errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 409:
        return "the repository exists already: choose another name, or add --overwrite"
    if status in (401, 403) or isinstance(error, library.errors.LocalTokenNotFoundError):
        return "the Hub knows no user who may write there: run `hf auth login`, or set HF_TOKEN"
    told = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return told if status is not None else f"the Hub cannot be reached ({told})"


def push(
    folder: str | Path,
    files: Sequence[str],
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
) -> str:
    """Create a model repository and upload the named files of a folder, nothing else.

    Args:
        folder: an exported folder.
        files: names in it.
        repository: ``OWNER/NAME``; must not exist unless ``overwrite``.
        private: whether only its owner sees it.
        overwrite: upload into a repository that exists; the files there of the same names are replaced.

    Returns:
        The address of the repository.

    Raises:
        ConnectionError: one sentence, if the Hub cannot be reached or refuses; the folder stays as it is.
    """
    library = _library()
    api = library.HfApi(library_name="dinovmf_plugin", library_version=__version__)
    try:
        created = api.create_repo(
            repo_id=repository, repo_type="model", private=private, exist_ok=overwrite
        )
        api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=f"Weights exported by dinovmf_plugin {__version__}",
        )
    # whichever transport the installed version uses: its errors are one or the other
    except (OSError, library.errors.HTTPError) as error:
        raise ConnectionError(
            f"--push-to {repository}: {_reason(error, library)}; the export itself is complete, and "
            f"`hf upload {repository} {folder}` sends it"
        ) from error
    return str(created)
