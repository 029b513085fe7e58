"""A model folder by name: a local folder as it is, anything else from the Hugging Face hub.

Only safetensors weights, JSON and tokenizer files are fetched, never code or pickles.
`huggingface_hub` reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT when it is
imported, so it is imported on use. Leaves out opening what was fetched.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import CheckpointError

_WANTED = (
    "model.safetensors",
    "model-*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)


def fetch_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    patterns: Sequence[str] = _WANTED,
) -> Path:
    """The local folder of a model: `name` itself if it is one, else its hub snapshot, fetched.

    Arguments as in transformers; `patterns` of file names say what to fetch, by default all that
    a model needs. `CheckpointError` if it is not there, gated, or not reachable.
    """
    inside = _checked_subfolder(subfolder)
    text = os.fspath(name)
    local = Path(text).expanduser()
    if local.is_dir():
        return _existing(local / inside, text)
    if local.exists():
        raise CheckpointError(f"{text} is a file: pass the folder that holds the model")
    if local.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise CheckpointError(f"the folder {text} does not exist")
    prefix = f"{subfolder}/" if subfolder else ""
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            text,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in patterns],
            # The patterns' * also matches "/": keep to one folder.
            ignore_patterns=[f"{prefix}*/*"],
        )
    except Exception as error:
        # The hub client raises dozens of types, its HTTP library's among them; each becomes one.
        raise CheckpointError(
            _sentence(text, revision, cache_dir, local_files_only, error)
        ) from error
    return _existing(Path(snapshot) / inside, text)


def _checked_subfolder(subfolder: str | None) -> Path:
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"subfolder {subfolder!r} must lie inside the model's folder")
    return inside


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{name} has no folder {folder.name!r}: check subfolder=")
    return folder


def _sentence(
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_only: bool,
    error: Exception,
) -> str:
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither a folder here nor a hub id such as 'owner/name'"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then set "
            "HF_TOKEN or pass token="
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub: check revision="
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is not on the hub, or is private: check the name, or set HF_TOKEN or pass "
            "token= if you have access"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if local_only or constants.HF_HUB_OFFLINE:
            why = "local_files_only is set" if local_only else "HF_HUB_OFFLINE is set"
            cache = cache_dir or f"{constants.HF_HUB_CACHE} (HF_HUB_CACHE)"
            fix = "pass local_files_only=False" if local_only else "set HF_HUB_OFFLINE=0"
            return (
                f"{name}{at} is missing or incomplete in the hub cache {cache} and "
                f"{why}: {fix}, or pass a local folder"
            )
        return (
            f"{name}{at} is not in the hub cache and {constants.ENDPOINT} (HF_ENDPOINT) cannot be "
            "reached: check the network, or pass a local folder"
        )
    return f"fetching {name}{at} failed: {type(error).__name__}: {error}"
